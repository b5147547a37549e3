"""`longctx launch ...` is `python -m launch ...`."""

from collections.abc import Sequence

from .packages import check_packages
from .start import become_launcher


def run(argv: Sequence[str]) -> int:
    """Become the launcher."""
    check_packages()
    become_launcher(argv)
