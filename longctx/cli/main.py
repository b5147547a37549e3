"""The verbs, and what every verb shares: exit codes and errors without a traceback."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module

from ..errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from ..protocol import BAD_INPUT, DONE, FAILED

VERBS: Mapping[str, str] = {
    "train": "train a model; starts local processes unless torchrun already has",
    "plan": "draw a pipeline schedule with its bubble",
    "prepare": "turn documents into a tokenized store; prints the length histogram",
    "verify": "compare one batch in the chosen layout with one process",
    "import": "make weights to train from: a Hugging Face or Megatron-core model",
    "export": "write a run or checkpoint as a Hugging Face folder",
    "sample": "continue a prompt with a run, a checkpoint or a Hugging Face model",
    "ckpt": "ls, verify, prune or merge checkpoints",
    "eval": "loss by position, needles and generated tasks of a run's newest checkpoint",
    "config": "show every value with its source, or check a configuration for a world",
    "doctor": "check this machine: --selftest compares every layout with one process",
    "chaos": "rehearse failures: train while ranks are killed, and compare with what should come out",
    "launch": "start a program on machines",
}
MODULES: Mapping[str, str] = {"import": "import_model"}
"""Modules of verbs that Python reserves."""
USAGE = "usage: longctx VERB [FILE ...] [key=value ...] [~key] [--json]"
INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Run one verb and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text(), file=sys.stdout if argv else sys.stderr)
        return DONE if argv else BAD_INPUT
    if argv[0] == "--version":
        print(version())
        return DONE
    if argv[0] not in VERBS:
        close = get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
        return fail(f"unknown verb {argv[0]}; {hint}", BAD_INPUT)
    module = MODULES.get(argv[0], argv[0])
    verb: Callable[[Sequence[str]], int] = import_module(f".{module}", __package__).run
    return guarded(verb, argv[1:])


def guarded(verb: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a verb; an error that the user can act on becomes one line and an exit code."""
    try:
        return verb(argv)
    except (ConfigError, DataError) as error:
        return fail(str(error), BAD_INPUT)
    except (CheckpointError, TrainingDiverged) as error:
        return fail(str(error), FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def fail(message: str, exit_code: int) -> int:
    """Print an error and hand back its exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def help_text() -> str:
    """The verbs in a table."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return (
        "Train language models on very long sequences.\n\n"
        f"{USAGE}\n\nverbs:\n{verbs}\n\n"
        "FILE is a YAML file or a name below configs/, such as quickstart; later files win, then\n"
        "key=value. ~key returns to the default. compose+=model/llama3-8b adds a fragment.\n"
        "`longctx config show FILE` lists every key; `longctx VERB --help` says more about a verb."
    )


def version() -> str:
    """Name and version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"longctx-runtime {installed('longctx-runtime')}"
    except PackageNotFoundError:
        return "longctx-runtime (not installed, run from its folder)"
