"""`launch torchrun [--site FILE | --hosts FILE] [--ssh] [options] -- PROGRAM ...`."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import hosts
from ..errors import SpecError
from ..load import Loaded
from ..protocol import DONE
from ..quote import check_no_credential
from ..submit import record
from . import slurm


def run(argv: Sequence[str], program: Sequence[str]) -> int:
    """Print one line for each host; start them only with --ssh."""
    parser = argparse.ArgumentParser(prog="launch torchrun", usage=__doc__)
    slurm.add_spec(parser)
    parser.add_argument("--hosts", type=Path, help="file with one host a line, in the place of site.hosts")
    parser.add_argument("--ssh", action="store_true", help="start the lines through site.ssh")
    options = parser.parse_args(argv)
    loaded = slurm.spec(options, program)
    if not loaded.job.argv:
        parser.error("name the program after --, e.g. -- -m longctx train quickstart")
    if options.hosts:
        loaded = replace(loaded, site=replace(loaded.site, hosts=_hosts(options.hosts)))
    return _start(loaded, ssh=options.ssh and not options.dry_run)


def _start(loaded: Loaded, *, ssh: bool) -> int:
    port = hosts.choose_port(loaded.site)
    lines = hosts.lines(loaded, port=port, run_id=f"hosts-{port}")
    for line in lines:
        check_no_credential(line.command, os.environ)
    if not ssh:
        print("\n".join(f"# on {line.host}:\n{line.command}" for line in lines))
        return DONE
    record(Path(loaded.job.folder), {"backend": "torchrun", "ids": [], "processes": loaded.job.processes})
    return hosts.over_ssh(loaded, lines)


def _hosts(path: Path) -> tuple[str, ...]:
    try:
        names = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise SpecError(f"--hosts {path} cannot be read: {error.strerror}") from error
    return tuple(name for name in names if name)
