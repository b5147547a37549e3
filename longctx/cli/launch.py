"""`longctx launch slurm FILE ...`: check the configuration for the job's world, then `python -m launch`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..config.check import resolve
from ..config.load import LoadedConfig, load
from ..errors import ConfigError
from .arguments import make_parser, parse
from .folder import check_unused
from .start import become_launcher, check_packages

WITH_FILE = ("torchrun", "slurm")
VALUES = {
    "job": "job file: nodes, restarts, image...; without it the defaults",
    "site": "site file, or a name in configs/cluster",
    "hosts": "torchrun: file with one host a line",
}
LISTS = {
    "set": "KEY=VALUE of the job, or site.KEY=VALUE; may be repeated",
    "directive": "slurm: NAME=VALUE of an sbatch option; may be repeated",
    "no-directive": "slurm: NAME of an sbatch option to leave out; may be repeated",
}
FLAGS = {
    "dry-run": "print what would be started and stop",
    "no-follow": "slurm: return as soon as the job is in the queue",
    "ssh": "torchrun: start the lines on their hosts",
}


def run(argv: Sequence[str]) -> int:
    """Become the launcher; a FILE becomes the program `-m longctx train FILE ...`, checked."""
    check_packages()
    if argv[:1] == ["local"] and not any(each.startswith("-") for each in argv):
        from .train import run as train

        return train(argv[1:])
    if not argv or argv[0] not in WITH_FILE or "--" in argv:
        become_launcher(argv)
    parser = make_parser(f"launch {argv[0]}", f"Start `longctx train FILE` with {argv[0]}.")
    for name, text in VALUES.items():
        parser.add_argument(f"--{name}", default="", help=text)
    for name, text in LISTS.items():
        parser.add_argument(f"--{name}", action="append", default=[], help=text)
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    arguments = parse(parser, argv[1:])
    options = _options(vars(arguments.options))
    _launch(argv[0], load(arguments.files, arguments.overrides), options)


def _options(values: dict[str, Any]) -> list[str]:
    """The launcher's own options, as it wants them."""
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        each = value if isinstance(value, list) else [value] if isinstance(value, str) and value else []
        words += [option] if value is True else [f"{option}={one}" for one in each]
    return words


def _launch(backend: str, loaded: LoadedConfig, options: list[str]) -> NoReturn:
    shape = _shape([each for each in options if each.startswith(("--job", "--site", "--set"))])
    world = shape["nodes"] * shape["processes"]
    device = "cuda" if shape["devices"] else "cpu"
    if loaded.config.run.device not in ("auto", device):
        raise ConfigError(
            f"run.device={loaded.config.run.device}, but the site has {shape['devices']} devices on a node; "
            "set site.devices in the site file, or run.device=auto"
        )
    config = resolve(loaded.config, world, device, node_ranks=shape["processes"])
    folder = Path(config.run.dir)
    if "--dry-run" not in options and (backend == "slurm" or "--ssh" in options):
        check_unused(folder, resume=config.run.resume)
        from ..data.prepare import describe, prepare

        prepared = prepare(config.data, progress=True)
        if prepared.created:
            print(describe(prepared, config.data.seq_len))
    program = ["-m", "longctx", "train", *loaded.files, *loaded.overrides]
    if config.run.device != loaded.config.run.device:
        program.append(f"run.device={device}")
    known = [f"--folder={folder}", f"--world={world}", f"--save-s={_save_s(folder)}"]
    become_launcher([backend, *options, *known, "--", *program])


def _shape(options: list[str]) -> dict[str, int]:
    """Nodes, processes and devices of the job, which launch knows."""
    command = [sys.executable, "-m", "launch", "shape", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout))


def _save_s(folder: Path) -> float:
    """Seconds of the slowest save that this run has measured; 0: none."""
    events = folder / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    saves = [json.loads(line) for line in lines if '"checkpoint"' in line and line.endswith("}")]
    return max((float(each.get("stall_s", 0)) for each in saves), default=0.0)
