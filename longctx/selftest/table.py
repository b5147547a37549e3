"""The parity matrix as a page, and the combinations that are refused, with the reason."""

import time
from collections.abc import Iterable, Sequence

from ..config.check import resolve
from ..config.load import load
from ..errors import ConfigError
from .result import Result

ADAPTIVE = ("step_plan.groups=adaptive", "curriculum.kind=natural", "step_plan.lockstep=false")
REFUSED = {
    "pp beyond the layers": (4, ["parallel.pp=4", "model.num_layers=3"]),
    "pp with split backward x resharding": (
        2,
        ["parallel.pp=2", "pipeline.schedule=zb-h1", "parallel.reshard_after_forward=true"],
    ),
    "pp with split backward x compiled blocks": (
        2,
        ["parallel.pp=2", "pipeline.schedule=zb-v", "train.compile=true"],
    ),
    "pp x reshard_after_forward as a group": (
        8,
        ["parallel.pp=2", "parallel.dp_shard=4", "parallel.reshard_after_forward=2"],
    ),
    "pp with slices x strategy allgather": (
        4,
        ["parallel.pp=2", "parallel.ring=2", "pipeline.slices=4", "attention.strategy=allgather"],
    ),
    "pp x lockstep=false": (4, ["parallel.pp=2", "parallel.dp_shard=2", *ADAPTIVE]),
    "lockstep=false x resharding": (
        2,
        ["parallel.dp_shard=2", *ADAPTIVE, "parallel.reshard_after_forward=true"],
    ),
    "ep x any axis": (2, ["parallel.ep=2", "parallel.dp_shard=2"]),
    "ring x strategy ulysses": (2, ["parallel.ring=2", "attention.strategy=ulysses"]),
    "ulysses x strategy ring": (2, ["parallel.ulysses=2", "attention.strategy=ring"]),
    "ring x strategy local": (2, ["parallel.ring=2", "attention.strategy=local"]),
    "tp that does not divide ffn_size": (2, ["parallel.tp=2", "model.ffn_size=383"]),
    "tp that does not divide num_heads": (3, ["parallel.tp=3", "model.ffn_size=384"]),
    "tp x num_kv_heads without a common share": (
        4,
        ["parallel.tp=4", "model.num_heads=12", "model.num_kv_heads=6"],
    ),
    "ulysses x tp beyond the heads": (8, ["parallel.tp=2", "parallel.ulysses=4"]),
    "tp x reshard_after_forward as a group": (
        8,
        ["parallel.tp=2", "parallel.dp_shard=4", "parallel.reshard_after_forward=2"],
    ),
    "degrees that do not multiply to the processes": (6, ["parallel.tp=2", "parallel.ring=2"]),
}
_PLAIN = ["parallel.dp_shard=1", "parallel.ring=1", "parallel.ulysses=1"]


def refusals() -> dict[str, str]:
    """What cannot be combined and the error that says so.

    Raises:
        AssertionError: one of them is accepted.
    """
    found = {}
    for name, (size, overrides) in REFUSED.items():
        try:
            resolve(load([], [*_PLAIN, *overrides]).config, size, "cpu")
        except ConfigError as error:
            found[name] = str(error)
        else:
            raise AssertionError(f"{name}: {overrides} on {size} processes was accepted")
    return found


def page(results: Sequence[Result], *, where: str, commit: str) -> str:
    """`docs/parity.md`: one row per layout, then what is refused.

    Args:
        results: of every cell that ran.
        where: the machine in words.
        commit: of the tree that ran.
    """
    bad = [r for r in results if not r.good]
    lines = [
        "# Parity: every layout against one process",
        "",
        "Written by `longctx doctor --selftest --write docs/parity.md`; do not edit.",
        f"Commit {commit}, {time.strftime('%Y-%m-%d')}, {where}.",
        "",
        "A two-layer model on packed documents with a long tail of lengths. Loss, logits and every",
        "parameter's gradient: largest difference over the tensor's scale (floored at 1e-3 of the",
        "median scale). Allowed: 1e-5 in float32, 1e-10 in float64, 0.05 in bfloat16. Ten steps: largest",
        "relative difference of loss or gradient norm over ten optimizer steps in float64.",
        "",
        f"{len(results)} cells, {len(results) - len(bad)} equal, {len(bad)} not.",
        "",
        "| layout | processes | cells | float32 | float64 | bfloat16 | ten steps | |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(layout, [r for r in results if r.cell.layout == layout]) for layout in _layouts(results)),
        "",
        "Cells of a layout: both dtypes, recomputation none/full/every second block, one and three",
        "microbatches, a batch of two tokens that leaves ranks without any, tied models with and without",
        "dropout, untied ones with biases and query/key norms, FSDP resharding on, off and over groups of",
        "2; with pp 1F1B and, with a batch of two tokens, ZB-H1; compiled where said. Every schedule, slices",
        "and swapped ends: `tests/longctx/test_pipeline_parity.py`.",
        "",
        "## Not equal",
        "",
        *([f"- {r.cell.name}: {r.error:.1e} in {r.tensor}" for r in bad] or ["None."]),
        "",
        "## Refused",
        "",
        *(f"- {name}: `{reason}`" for name, reason in refusals().items()),
        "",
    ]
    return "\n".join(lines)


def _layouts(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(r.cell.layout for r in results))


def _row(layout: str, results: Sequence[Result]) -> str:
    worst = {d: [r.error for r in results if r.cell.dtype == d] for d in ("float32", "float64", "bfloat16")}
    steps = [r.steps_error for r in results if r.cell.steps]
    figures = [f"{max(v):.1e}" if v else "-" for v in (*worst.values(), steps)]
    compiled = " (compiled too)" if any(r.cell.compile for r in results) else ""
    verdict = "equal" if all(r.good for r in results) else "DIFFERS"
    processes = results[0].cell.size
    return f"| {layout}{compiled} | {processes} | {len(results)} | {' | '.join(figures)} | {verdict} |"
