"""`longctx launch ...` is `python -m launch ...`."""

from collections.abc import Sequence

from .start import become_launcher, check_packages


def run(argv: Sequence[str]) -> int:
    """Become the launcher."""
    check_packages()
    become_launcher(argv)
