"""Pictures of a report: loss by position, and one heat map of depth and length for each task."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOSSES = ("loss", "original")


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report's pictures as PNG files into an existing folder; returns their paths."""
    drawn = []
    tasks = report["tasks"]
    losses = {f"{name} {length}": task for name in _LOSSES for length, task in tasks.get(name, {}).items()}
    if losses:
        drawn.append(_save(folder / "loss_by_position.png", lambda axes: _loss(axes, losses)))
    for name, lengths in tasks.items():
        if name not in _LOSSES:
            drawn.append(_save(folder / f"{name}.png", lambda axes, n=name, t=lengths: _heat(axes, n, t)))
    return drawn


def _save(path: Path, paint: Any) -> Path:
    from matplotlib.figure import Figure  # half a second, and only here

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    paint(figure.add_subplot())
    figure.savefig(path, dpi=120)
    return path


def _loss(axes: "Axes", losses: Mapping[str, Any]) -> None:
    for name, task in losses.items():
        middle = [(each["from"] + each["to"]) / 2 for each in task["buckets"]]
        axes.plot(middle, [each["loss"] for each in task["buckets"]], marker="o", label=name)
    axes.set_xlabel("position in tokens")
    axes.set_ylabel("held-out loss in nats")
    axes.legend()
    axes.grid(alpha=0.3)


def _heat(axes: "Axes", name: str, lengths: Mapping[str, Any]) -> None:
    import numpy as np

    order = sorted(lengths, key=int)
    scores = np.array([lengths[each]["score"] for each in order], dtype=float).T  # [depths, lengths]
    axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(order)), [f"{int(each):,}" for each in order])
    depths = lengths[order[0]]["depths"]
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for (row, column), score in np.ndenumerate(scores):
        text = "not reached" if np.isnan(score) else f"{score:.0%}"
        axes.text(column, row, text, ha="center", va="center")
    axes.set_xlabel("context in tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{name}: prompts answered exactly")
