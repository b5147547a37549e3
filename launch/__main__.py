"""`python -m launch VERB [options] [-- PROGRAM ...]`."""

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module

from .errors import LaunchError
from .local import say
from .protocol import BAD_INPUT, DONE

STARTING: Mapping[str, str] = {
    "local": "on this machine, under torchrun",
    "torchrun": "on a list of hosts: prints one line for each, or reaches them by ssh",
    "slurm": "render a batch script, check, submit, follow",
}
JOB: Mapping[str, str] = {
    "status": "how the job of a run folder stands",
    "logs": "what a rank has printed",
    "requeue": "put the job back into the queue after a checkpoint",
    "cancel": "stop the job",
    "hang": "where every rank stands, and which rank waits for which",
}
NODE = ("preflight", "begin", "verdict", "attend")
"""Called by batch scripts."""
OTHER: Mapping[str, str] = {
    "shape": "the world that a job and a site make, as JSON",
    "doctor": "what this machine is fit for, without torch",
    "examples": "render the examples in launch/examples anew",
}


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    own, program = split(argv)
    if not own or own[0] in ("-h", "--help"):
        print(help_text(), file=sys.stdout if own else sys.stderr)
        return DONE if own else BAD_INPUT
    verb, *options = own
    try:
        return _run(verb, options, program)
    except LaunchError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(verb: str, options: Sequence[str], program: Sequence[str]) -> int:
    if verb in STARTING:
        return int(import_module(f".verbs.{verb}", __package__).run(options, program))
    module = "job" if verb in JOB else "node" if verb in NODE else "other" if verb in OTHER else ""
    if not module:
        known = [*STARTING, *JOB, *OTHER]
        close = get_close_matches(verb, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(known)}"
        say(f"error: unknown verb {verb}; {hint}")
        return BAD_INPUT
    return int(getattr(import_module(f".verbs.{module}", __package__), verb)(options))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`."""
    arguments = list(argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def help_text() -> str:
    """The verbs in a table."""
    rows = [f"  {verb:<10}{text}" for group in (STARTING, JOB, OTHER) for verb, text in group.items()]
    usage = "usage: launch VERB [options] [-- PROGRAM ...]"
    return "\n".join(["Start programs on machines.", "", usage, "", *rows])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
