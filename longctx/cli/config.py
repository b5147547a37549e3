"""`longctx config show FILE ...` and `longctx config check FILE ...`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from ..config.check import resolve
from ..config.load import load
from ..config.show import describe, table, values
from ..errors import ConfigError
from .arguments import make_parser, parse
from .machine import choose_local

HELP = """usage: longctx config show FILE ... [key=value ...] [--json]
       longctx config check FILE ... [key=value ...] [--world N] [--device cpu|cuda] [--node-ranks N]

show   every key with its value and where it comes from
check  resolve `auto` for a world and check all keys against each other; nothing is started"""


def run(argv: Sequence[str]) -> int:
    """Dispatch to `show` or `check`."""
    verbs = {"show": show, "check": check}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] not in verbs:
        raise ConfigError(f"unknown verb config {argv[0]}; choose show or check")
    return verbs[argv[0]](argv[1:])


def show(argv: Sequence[str]) -> int:
    """Every value with its source."""
    parser = make_parser("config show", "Print every key with its value and where the value comes from.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parse(parser, argv)
    rows = values(load(arguments.files, arguments.overrides))
    print(json.dumps(rows) if arguments.options.json else table(rows))
    return 0


def check(argv: Sequence[str]) -> int:
    """Resolve and check for a world that need not be here."""
    parser = make_parser("config check", "Resolve and check a configuration for a world; nothing is started.")
    parser.add_argument("--world", type=int, help="processes; by default as many as train would start here")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default what train would use here")
    parser.add_argument("--node-ranks", type=int, default=8, help="processes of one node (8)")
    parser.add_argument("--json", action="store_true", help="print the resolved configuration as JSON")
    arguments = parse(parser, argv)
    options = arguments.options
    config = load(arguments.files, arguments.overrides).config
    if options.node_ranks < 1:
        raise ConfigError(f"--node-ranks={options.node_ranks}; choose at least 1")
    if options.world is None or options.device is None:
        local = choose_local(config)
        options.world, options.device = options.world or local.processes, options.device or local.device
    resolved = resolve(config, options.world, options.device, node_ranks=options.node_ranks)
    print(json.dumps(asdict(resolved)) if options.json else describe(resolved))
    return 0
