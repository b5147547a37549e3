"""Rendered examples in launch/examples: what each site file makes of the same job."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from .check import check
from .load import CLUSTERS, load
from .local import say
from .protocol import DONE, FAILED
from .slurm import render

FOLDER = Path(__file__).with_name("examples")
PROGRAM = ["-m", "longctx", "train", "configs/recipes/quickstart.yaml", "run.dir=/shared/runs/long"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One rendered script."""

    site: str
    """Site file by name."""
    changes: tuple[str, ...] = ()
    """`--set` of the command line."""
    removed: tuple[str, ...] = field(default=())
    """Directives that the site refuses."""


EXAMPLES = {
    "slurm": Example(site="slurm", changes=("nodes=4", "time_limit=12h")),
    "slurm-spares": Example(site="slurm", changes=("nodes=4", "spare_nodes=1", "site.network.interface=ib0")),
    "slurm-refused": Example(site="slurm", changes=("nodes=2",), removed=("exclusive", "gpus-per-node")),
    "slurm-chain": Example(site="slurm", changes=("nodes=2", "restart.mode=chain", "restart.links=4")),
    "slurm-array": Example(site="slurm", changes=("nodes=2", "restart.mode=array", "restart.links=4")),
    "slurm-het": Example(
        site="slurm",
        changes=(
            "groups=[{nodes: 1, directives: {constraint: h100}}, {nodes: 2, directives: {constraint: a100}}]",
        ),
    ),
    "slurm-pyxis": Example(
        site="slurm-pyxis",
        changes=("nodes=2", "environment.image=/shared/images/longctx.sqsh", "mounts=[/data:/data:ro]"),
    ),
    "slurm-apptainer": Example(
        site="slurm",
        changes=(
            "nodes=2",
            "environment.image=/shared/images/longctx.sif",
            "site.container.runtime=apptainer",
        ),
    ),
}


def rendered(example: Example) -> str:
    """The script; interpreter and folders are those of nobody in particular."""
    values = {"argv": PROGRAM, "folder": "/shared/runs/long", "workdir": "/shared/longctx"}
    loaded = load("", str(CLUSTERS / f"{example.site}.yaml"), example.changes, values=values)
    environment = loaded.job.environment
    if not environment.image:
        environment = replace(environment, python="/shared/longctx/.venv/bin/python")
    loaded = check(replace(loaded, job=replace(loaded.job, environment=environment)))
    return render(loaded, dict.fromkeys(example.removed), environ={})


def write(*, check_only: bool) -> int:
    """Write every example; or compare, and name those that differ."""
    FOLDER.mkdir(exist_ok=True)
    different = []
    for name, example in EXAMPLES.items():
        path, text = FOLDER / f"{name}.sbatch", rendered(example)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            different.append(path.name)
            if not check_only:
                path.write_text(text, encoding="utf-8")
    if different:
        say(f"{'differs' if check_only else 'written'}: {', '.join(different)}")
    return FAILED if check_only and different else DONE
