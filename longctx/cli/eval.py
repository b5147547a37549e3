"""`longctx eval FILE ...` and `longctx eval RUN_FOLDER`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.load import LoadedConfig, load
from ..config.schema import Config
from ..errors import ConfigError
from ..protocol import DONE, STATUS
from .arguments import Arguments, make_parser, parse
from .start import start, under_torchrun
from .worker import work

if TYPE_CHECKING:
    from ..build import World

RESOLVED = "config.resolved.yaml"
_OF_THAT_MACHINE = ("run.processes", "run.device", "parallel", "pipeline", "step_plan")
"""Keys and sections that say how that machine trained, which is nothing to an evaluation on this one."""


def run(argv: Sequence[str]) -> int:
    """Evaluate the newest checkpoint of a run, or `checkpoint.init_from`, by position and length."""
    parser = make_parser(
        "eval",
        "Where in the context a run's newest checkpoint works: loss by position, needles, generated tasks. "
        "FILE is a run folder, or the configuration of a run.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON line")
    parser.add_argument(
        "--search-scales",
        type=int,
        default=0,
        metavar="GROUPS",
        help="find eval.remap.scales for DPE with this many groups of pairs, and evaluate with them",
    )
    arguments = parse(parser, argv)
    options = arguments.options
    loaded = _load(arguments)
    folder = Path(loaded.config.run.dir, "eval")
    if under_torchrun():
        body = partial(_body, as_json=options.json, groups=options.search_scales)
        return work(loaded, body, status=folder / STATUS)
    flags = [*(["--json"] if options.json else []), f"--search-scales={options.search_scales}"]
    start("eval", loaded, folder=folder, options=flags)


def _load(arguments: Arguments) -> LoadedConfig:
    """The configuration; a run folder stands for its own, with degrees for this machine."""
    folders = [Path(name) for name in arguments.files if (Path(name) / RESOLVED).is_file()]
    if not folders:
        return load(arguments.files, arguments.overrides)
    if len(arguments.files) > 1:
        raise ConfigError(f"{folders[0]} is a run folder; name it alone, and change keys with key=value")
    own = (*(f"~{key}" for key in _OF_THAT_MACHINE), f"run.dir={folders[0]}")
    return load([str(folders[0] / RESOLVED)], (*own, *arguments.overrides))


def _body(config: Config, world: "World", *, as_json: bool, groups: int) -> int:
    from .. import checkpoint
    from ..build import build
    from ..data.sources import open_data
    from ..eval.evaluate import check, evaluate, find_scales
    from ..eval.files import lines, write
    from ..train.begin import begin

    built = build(config, world)
    folder = checkpoint.checkpoints_folder(built)
    if checkpoint.resume(built, folder) is None:
        if not config.checkpoint.init_from:
            raise ConfigError(
                f"{folder} holds no checkpoint; train first, name another run.dir, or evaluate a model with "
                "checkpoint.init_from"
            )
        begin(built, config.checkpoint.init_from)
    opened = open_data(config.data)
    check(built, opened)
    remap = config.eval.remap
    if groups:
        remap = replace(remap, type="dpe", scales=find_scales(built, opened, groups=groups))
        if world.rank == 0:
            print(f"eval.remap.scales=[{','.join(map(str, remap.scales))}]", flush=True)
    report = evaluate(built, opened, remap=remap)
    if world.rank == 0:
        written = write(report, Path(config.run.dir, "eval", f"step-{report['step']}"))
        text = json.dumps(report) if as_json else "\n".join([*lines(report), f"report  {written}"])
        print(text, flush=True)
    built.close()
    return DONE
