"""`longctx VERB ...` and `python -m longctx VERB ...`."""

import sys

from .origin import intruder


def main() -> None:
    """Entry point of the console script."""
    problem = intruder(sys.path)
    if problem:
        sys.exit(_refuse(problem))
    from .cli.main import main as run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


def _refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
