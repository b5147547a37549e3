"""`longctx launch slurm FILE ...`: check the configuration for the job's world, then `python -m launch`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ..claim import check_unused
from ..config.check import resolve
from ..config.load import LoadedConfig, load
from ..config.schema import Config
from ..errors import ConfigError
from .arguments import make_parser, parse
from .start import become_launcher, check_packages, launcher, prepare_data

WITH_FILE = ("local", "torchrun", "slurm")
METRICS = "metrics.jsonl"
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
    loaded = load(arguments.files, arguments.overrides)
    if argv[0] == "local":
        _here(loaded, options)
    _launch(argv[0], loaded, options)


def _options(values: dict[str, Any]) -> list[str]:
    """The launcher's own options, as it wants them."""
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        each = value if isinstance(value, list) else [value] if isinstance(value, str) and value else []
        words += [option] if value is True else [f"{option}={one}" for one in each]
    return words


def _here(loaded: LoadedConfig, options: list[str]) -> NoReturn:
    """This machine: as `longctx train`, with the job and the site that were named."""
    config, folder = loaded.config, Path(loaded.config.run.dir)
    found: list[str] = []
    if _spec(options):
        shape = _shape([*_spec(options), "--here"])
        if shape["chosen"]:
            found.append(f"run.processes={shape['processes']}")
            run = replace(config.run, processes=shape["processes"])
            config = replace(config, run=run)
        found += _grace(shape, config)
    if "--dry-run" not in options:
        check_unused(folder, resume=config.run.resume)
    loaded = replace(loaded, config=config, overrides=(*loaded.overrides, *found))
    backend, *words = launcher("train", loaded, folder=folder, starts="--dry-run" not in options)
    become_launcher([backend, *options, *words])


def _spec(options: list[str]) -> list[str]:
    """The options that name the job and the site."""
    return [each for each in options if each.startswith(("--job", "--site", "--set"))]


def _grace(shape: dict[str, int], config: Config) -> list[str]:
    """The override that tells the run how long a preemption leaves it."""
    known = shape["grace"] and not config.checkpoint.grace_s
    return [f"checkpoint.grace_s={shape['grace']}"] if known else []


def _launch(backend: str, loaded: LoadedConfig, options: list[str]) -> NoReturn:
    submits = ["--submits"] if backend == "slurm" and "--dry-run" not in options else []
    shape = _shape([*_spec(options), *submits])
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
        prepare_data(config)
    program = ["-m", "longctx", "train", *loaded.files, *loaded.overrides, *_grace(shape, config)]
    if config.run.device != loaded.config.run.device:
        program.append(f"run.device={device}")
    known = [f"--folder={folder}", f"--world={world}", f"--stop-s={_stop_s(folder)}"]
    become_launcher([backend, *options, *known, "--", *program])


def _shape(options: list[str]) -> dict[str, int]:
    """Nodes, processes, devices, grace time: what launch knows of the job."""
    command = [sys.executable, "-m", "launch", "shape", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout))


def _stop_s(folder: Path) -> float:
    """Seconds of the slowest step and the slowest save that this run has measured; 0: no save."""
    save = _slowest(folder / "events.jsonl", "save_s")
    return save and save + _slowest(folder / METRICS, "step_time_s")


def _slowest(path: Path, key: str) -> float:
    """The largest value of a key among JSON lines, 0 without any; a line that a kill cut short is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if f'"{key}"' in line and line.endswith("}")]
    return max((float(each[key]) for each in found), default=0.0)
