"""A timeline as a picture: one row per rank, one box per computation, white where a rank waits."""

from pathlib import Path
from typing import Any

from parallel.pipeline.simulate import Span, Timeline

from ..errors import ConfigError

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#f2a65a",
    "backward_input": "#f2a65a",
    "backward_weight": "#8cc68c",
}
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weights",
}
_MOST_LABELS = 1500


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        timeline: what happens when.
        title: words above it.
        path: the file; its folder is made.

    Raises:
        ConfigError: the name does not end in .png, or matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise ConfigError(f"--schedule={path} is no PNG; choose a name that ends in .png")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--schedule needs matplotlib; install longctx-runtime[plots]") from error
    ranks = len(timeline.spans)
    figure = Figure(figsize=(min(40.0, max(8.0, timeline.makespan / 4)), 1.2 + 0.5 * ranks), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [(rank, s) for rank, own in enumerate(timeline.spans) for s in own if s.stop > s.start]
    for rank, span in shown:
        _box(axes, rank, span, labelled=len(shown) <= _MOST_LABELS)
    kinds = dict.fromkeys(span.action.kind for _, span in shown)
    for kind in kinds:
        axes.bar(0, 0, color=COLOURS[kind], label=NAMES[kind])
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("time (one stage forward = 1)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def _box(axes: Any, rank: int, span: Span, *, labelled: bool) -> None:
    action = span.action
    axes.barh(
        rank,
        span.stop - span.start,
        left=span.start,
        height=0.9,
        color=COLOURS[action.kind],
        edgecolor="white",
        linewidth=0.5,
    )
    if labelled:
        part = f".{action.slice}" if action.slice else ""
        axes.text(
            (span.start + span.stop) / 2,
            rank,
            f"{action.microbatch}{part}",
            ha="center",
            va="center",
            fontsize=6,
        )
