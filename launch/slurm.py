"""A job and a site become one batch script."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from . import directives, exclusion
from .errors import SpecError
from .load import Loaded
from .quote import check_no_credential, exports, quote, secrets, words
from .sites import Directives, Site
from .spec import Job

TEMPLATES = Path(__file__).with_name("templates")
REQUIRED = (
    "parts",
    "workdir",
    "environment",
    "folder",
    "program",
    "python",
    "resume",
    "srun",
    "node_program",
)
"""What a template of one's own must use: without any of these a job would not be the one that was checked."""


def render(loaded: Loaded, changes: Directives, environ: Mapping[str, str] = os.environ) -> str:
    """The batch script.

    Args:
        loaded: a job and a site that have been checked.
        changes: directives of the command line.
        environ: of the person who submits; none of its credentials may appear.

    Raises:
        SpecError: a value that no script can hold, or a template that cannot be used.
    """
    text = _template(loaded).render(_values(loaded.job, loaded.site, changes))
    check_no_credential(text, environ)
    return text


def _template(loaded: Loaded) -> jinja2.Template:
    own = loaded.site.template
    path = loaded.base / own if own else TEMPLATES / "job.sbatch.j2"
    settings = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash writes the length of an array as ${#name[@]}
        comment_end_string="##}",
    )
    try:
        source = path.read_text(encoding="utf-8")
        used = meta.find_undeclared_variables(settings.parse(source))
        template = settings.from_string(source)
    except OSError as error:
        raise SpecError(f"site.template={path} cannot be read: {error.strerror}") from error
    except jinja2.TemplateError as error:
        raise SpecError(f"site.template={path}: {error}") from error
    missing = [name for name in REQUIRED if name not in used]
    strange = sorted(used - set(_names()))
    if missing:
        raise SpecError(
            f"template {path} lacks the placeholder {{{{ {missing[0]} }}}}; copy it from {TEMPLATES}"
        )
    if strange:
        raise SpecError(f"template {path} uses {{{{ {strange[0]} }}}}; the names are {', '.join(_names())}")
    return template


def _names() -> list[str]:
    return sorted(_values(Job(folder="/", workdir="/"), Site(), {}))


def _values(job: Job, site: Site, changes: Directives) -> dict[str, Any]:
    """Everything a template can use; all of it is quoted for the shell already."""
    het = bool(job.groups)
    return {
        "parts": directives.batch_directives(job, site, changes),
        "extra_lines": site.extra_lines,
        "workdir": quote(job.workdir, "workdir"),
        "folder": quote(job.folder, "folder"),
        "setup": [*_modules(site), *site.setup, *job.environment.setup],
        "environment": _environment(job, site),
        "program": words(job.argv),
        "resume": words(job.restart.argv),
        "het": het,
        "het_lists": " ".join(f'"$SLURM_JOB_NODELIST_HET_GROUP_{i}"' for i in range(len(job.groups))),
        "het_groups": _het_option(job),
        "links": job.restart.mode in ("chain", "array"),
        "requeue": job.restart.mode == "requeue",
        "requeues": job.restart.requeues,
        "signal": job.signal.name,
        "address": site.network.address,
        "port_first": site.network.port_first,
        "port_count": site.network.port_count,
        "timeout": site.network.timeout,
        "nodes": job.nodes,
        "elastic": f"{job.restart.min_nodes or job.nodes}:{job.nodes}"
        if job.restart.min_nodes
        else job.nodes,
        "processes": job.processes,
        "workers": job.restart.workers,
        "log_limit": job.log_limit,
        "exclude": site.checks.enabled and not het and job.restart.mode != "never",
        "asked": job.nodes + job.spare_nodes,
        "sinfo": quote(exclusion.FORMAT),
        "array": job.restart.mode == "array",
        "stage": [f"{quote(each.source)} {quote(each.target)}" for each in site.stage],
        "node_program": (TEMPLATES / "node.sh").read_text(encoding="utf-8").rstrip(),
        "srun": _srun(job, site),
        **_containers(job, site),
        **_tools(job, site),
    }


def _tools(job: Job, site: Site) -> dict[str, Any]:
    """Arguments of our own small programs around the training step."""
    checks, restart = site.checks, job.restart
    begin = [f"--no-progress={restart.no_progress}", f"--progress={restart.progress}"]
    begin += [f"--topology={job.topology}", f"--processes={job.processes}"]
    return {
        "preflight": checks.enabled,
        "check_timeout": checks.timeout,
        "checks": words(
            [
                f"--disk={checks.disk}",
                f"--shm={checks.shm}",
                f"--clock={checks.clock}",
                f"--devices={_devices(job, site)}",
            ]
        ),
        "begin": words([*begin, *(["--preflight"] if checks.enabled else [])]),
        "verdict": words([f"--failures={restart.failures}", f"--processes={job.processes}"]),
    }


def _devices(job: Job, site: Site) -> int:
    return site.devices if job.devices is None else job.devices


def _modules(site: Site) -> list[str]:
    return [f"module load {words(site.modules)}"] if site.modules else []


def _environment(job: Job, site: Site) -> list[str]:
    """Exports: ours first, so that a site or a job changes them; interfaces by name."""
    ours: dict[str, str | None] = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
    ours["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = f"{job.folder}/fr/rank_"
    if site.network.interface:
        ours |= {name: site.network.interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return [*exports({**ours, **site.env, **job.env}), *secrets(job.secrets)]


def _srun(job: Job, site: Site) -> str:
    """Options of the training step.

    After the first node has ended the others have half a minute to end by themselves: the first to
    leave after a checkpoint must not cut off the one that still writes down how the job ended.
    """
    ours: Directives = {"ntasks-per-node": 1, "kill-on-bad-exit": "0", "wait": 30}
    if not job.groups:
        ours = {"nodes": job.nodes, "ntasks": job.nodes, "distribution": "arbitrary", **ours}
    chosen = {**ours, **site.srun}
    return (words(directives.options(chosen)) + _het_option(job)).strip()


def _het_option(job: Job) -> str:
    return f" --het-group={','.join(map(str, range(len(job.groups))))}" if job.groups else ""


def _containers(job: Job, site: Site) -> dict[str, str]:
    """`python`: the words that start Python on a node; `step`: what srun adds for a container."""
    image, runtime = job.environment.image, site.container.runtime
    if not image:
        return {"python": words([job.environment.python or sys.executable]), "step": ""}
    python = job.environment.python or "python3"
    mounts = [*_own_mounts(job), *job.mounts]
    if runtime == "pyxis":
        names = [*sorted({**site.env, **job.env, **job.secrets}), "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
        options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-workdir={job.workdir}", f"--container-env={','.join(names)}"]
        return {"python": words([python]), "step": words([*options, *site.container.options])}
    gpu = ["--nv"] if _devices(job, site) else []
    binds = [f"--bind={each}" for each in mounts]
    command = [
        "apptainer",
        "exec",
        *gpu,
        f"--pwd={job.workdir}",
        *binds,
        *site.container.options,
        image,
        python,
    ]
    return {"python": words(command), "step": ""}


def _own_mounts(job: Job) -> list[str]:
    return [f"{each}:{each}" for each in dict.fromkeys([job.workdir, job.folder])]
