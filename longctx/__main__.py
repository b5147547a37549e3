"""`longctx VERB ...` and `python -m longctx VERB ...`."""

import sys

from .cli.main import main as run_command_line


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
