"""`--verify` of import and export."""

import sys
from pathlib import Path
from typing import Any

from ..protocol import DONE, FAILED


def compared(ours: str, theirs: Path) -> tuple[int, dict[str, Any]]:
    """Compare a model of ours with a Hugging Face folder; exit code and figures."""
    from ..hf.source import open_source
    from ..infer.compare import TOLERANCE, compare

    found = compare(open_source(ours), theirs)
    figures = {"logits_error": found.logits_error, "first_differing_layer": found.first_layer}
    if found.equal:
        print(f"logits equal transformers' to {found.logits_error:.1e} of the largest", file=sys.stderr)
        return DONE, figures
    print(
        f"error: {found.first_layer} is the first that differs from transformers by more than "
        f"{TOLERANCE:g}; logits differ by {found.logits_error:.1e} of the largest",
        file=sys.stderr,
    )
    return FAILED, figures
