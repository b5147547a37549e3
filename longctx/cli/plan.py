"""`longctx plan FILE ... --schedule PNG`: a pipeline's schedule as a picture, before anything runs."""

from collections.abc import Sequence
from pathlib import Path

from parallel.pipeline.schedule import bubble, make_schedule
from parallel.pipeline.simulate import Timeline, simulate

from ..config.check import parallel_config, resolve
from ..config.degrees import data_groups, microbatches
from ..config.load import load
from ..config.pipeline import spec_of, stage_layers
from ..config.schema import Config
from ..errors import ConfigError
from .arguments import make_parser, parse
from .machine import choose_local


def run(argv: Sequence[str]) -> int:
    """Print what the schedule costs and draw it."""
    parser = make_parser("plan", "Draw the pipeline schedule of a configuration. No GPU, nothing is started.")
    parser.add_argument("--schedule", type=Path, required=True, metavar="PNG", help="file to write")
    parser.add_argument("--world", type=int, help="processes; by default as many as train would start here")
    parser.add_argument("--microbatches", type=int, help="per pipeline; by default what fills a batch")
    arguments = parse(parser, argv)
    options = arguments.options
    config = load(arguments.files, arguments.overrides).config
    local = choose_local(config)
    config = resolve(config, options.world or local.processes, local.device)
    if config.parallel.pp == 1:
        raise ConfigError("parallel.pp=1 has no schedule to draw; set parallel.pp, and --world if need be")
    count = options.microbatches or -(-microbatches(config) // data_groups(parallel_config(config)))
    if count < 1:
        raise ConfigError(f"--microbatches={count}; choose at least 1")
    timeline = simulate(make_schedule(spec_of(config), count))
    title = describe(config, count, timeline)
    _draw(timeline, title, options.schedule)
    print(f"{title}\nwrote {options.schedule}")
    return 0


def describe(config: Config, count: int, timeline: Timeline) -> str:
    """Schedule, stages, and how long ranks wait, in two lines."""
    spec = spec_of(config)
    layers = " + ".join(str(len(stage)) for stage in stage_layers(config, spec.placement()))
    formula = bubble(spec, count)
    said = "no formula" if formula is None else f"formula {formula:.1%}"
    slices = f" x {spec.slices} slices" if spec.slices > 1 else ""
    few = "; fewer microbatches than stages" if count * spec.slices < spec.ranks else ""
    return (
        f"{spec.name}, {spec.ranks} ranks, layers {layers}, {count} microbatches{slices}\n"
        f"bubble {timeline.bubble:.1%} ({said}), at most {max(timeline.in_flight)} stage inputs kept{few}"
    )


def _draw(timeline: Timeline, title: str, path: Path) -> None:
    from .schedule_picture import draw  # matplotlib takes a second to import

    draw(timeline, title, path)
