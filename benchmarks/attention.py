"""Attention over a split sequence on CPU: ours against yunchang, DeepSpeed and one process.

Forward and backward of one causal layer in float32, 32 query heads, 8 or 32 key heads, head dim 16 (a
whole run takes minutes), 4K, 8K and 16K tokens: one document, and a long-tail pack (lognormal
lengths, median 256 tokens, sigma 1.2, multiples of 4 so that every peer can cut them). Two
processes of one thread each; `sdpa` is one process with two threads while the other waits. All
candidates run in one set of processes, in turns. Peak is the growth of resident memory over what
a candidate starts with, the largest of the ranks, from a round of its own. A peer counts as
correct if out and all gradients of the 4K case are within 1e-4 of one process.

At 4 and 8 processes only work and bytes are counted: the machine has two cores.

DeepSpeed is measured if it lies on the path:
    pip install --no-deps --target peers deepspeed==0.19.8 && PYTHONPATH=peers python benchmarks/attention.py
"""

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.ROOT / "tests" / "support"))

import _attention_peers as peers
import numpy as np
import torch
import torch.distributed as dist
from _attention_counts import count
from ranks import run_ranks

from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

CORRECT = 1e-4
HEADS = {"gqa": (32, 8), "mha": (32, 32)}
Run = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison."""

    tokens: int
    pack: str
    heads: str
    head_dim: int
    rounds: int
    seed: int

    @property
    def name(self) -> str:
        """Prefix of its figures."""
        return f"{self.tokens // 1024}k_{self.pack}_{self.heads}"

    @property
    def offsets(self) -> list[int]:
        """cu_seqlens."""
        lengths = [self.tokens] if self.pack == "one" else long_tail(self.tokens, self.seed)
        return [0, *np.cumsum(lengths).tolist()]


def long_tail(tokens: int, seed: int) -> list[int]:
    """Lengths of a pack's documents."""
    generator, lengths = np.random.default_rng(seed), []
    while sum(lengths) < tokens:
        length = int(256 * np.exp(1.2 * generator.standard_normal())) // 4 * 4
        lengths.append(min(max(length, 4), tokens - sum(lengths)))
    return lengths


def cases(*, quick: bool, head_dim: int, seed: int) -> list[Case]:
    """Small ones first: their rounds also warm up the process."""
    found = []
    for tokens, rounds in ((1024, 1),) if quick else ((4096, 7), (8192, 3), (16384, 2)):
        for pack in ("tail", "one"):
            for heads in ("gqa",) if quick else HEADS:
                more = rounds + (4 if pack == "tail" and not quick else 0)
                found.append(Case(tokens, pack, heads, head_dim, more, seed))
    return found


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v and the gradient of out for the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(case.seed)
    num_heads, num_kv_heads = HEADS[case.heads]
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(case.tokens, n, case.head_dim, generator=generator) for n in counts]


def gradients(attend: peers.Attend, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    q, k, v = (x.requires_grad_() for x in given[:3])
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def make_run(name: str, attend: peers.Attend, given: list[torch.Tensor], rank: int) -> Run:
    """One forward and backward pass between barriers, so that every rank measures the slowest."""

    def run() -> None:
        dist.barrier()
        if name != "sdpa":
            gradients(attend, given)
        elif rank == 0:
            torch.set_num_threads(2)
            gradients(attend, given)
            torch.set_num_threads(1)
        dist.barrier()

    return run


def peak_mib(run: Run) -> float:
    """Growth of this process's resident memory while it runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def errors(
    found: dict[str, tuple[peers.Attend, torch.Tensor]], whole: list[torch.Tensor]
) -> dict[str, float]:
    """Largest relative error of out, dq, dk, dv of each candidate on this rank."""
    expected = gradients(found["sdpa"][0], [x.clone() for x in whole])
    worst = {}
    for name, (attend, index) in found.items():
        if name != "sdpa":
            got = gradients(attend, [x[index] for x in whole])
            pairs = zip(got, expected, strict=True)
            worst[name] = max(float((a - b[index]).abs().max() / b.abs().max()) for a, b in pairs)
    return worst


def disagreeing(wrong: dict[str, float], size: int) -> set[str]:
    """Candidates that are wrong on any rank; the same set on all."""
    found: list[Any] = [None] * size
    dist.all_gather_object(found, wrong)
    return {name for each in found for name, error in each.items() if not error <= CORRECT}


def measure(rank: int, size: int, todo: list[Case]) -> list[dict[str, Any]]:
    """All cases on one rank: seconds, peaks and errors by candidate."""
    mesh = build_mesh(ParallelConfig(dp_shard=size), "cpu")
    results: list[dict[str, Any]] = []
    incorrect: set[str] = set()
    for case in todo:
        whole = inputs(case)
        found = peers.candidates(mesh, case.offsets)
        if case.tokens > 4096:
            found = {name: each for name, each in found.items() if name not in incorrect}
        wrong = errors(found, whole) if case.tokens <= 4096 else {}
        incorrect |= disagreeing(wrong, size)
        shares = {name: [x[index] for x in whole] for name, (_, index) in found.items()}
        if rank:
            shares["sdpa"] = []
        del whole
        runs = {name: make_run(name, found[name][0], shares[name], rank) for name in found}
        peaks = {name: peak_mib(run) for name, run in runs.items()}
        seconds = harness.in_turns(runs, rounds=case.rounds, warm=True)
        results.append({"seconds": seconds, "peaks": peaks, "errors": wrong})
        if rank == 0:
            words = ", ".join(f"{n} {1e3 * harness.median(s):.0f}" for n, s in seconds.items())
            print(f"{case.name}: {words} ms", file=sys.stderr, flush=True)
    return results


def figures_of(case: Case, ranks: list[dict[str, Any]], incorrect: set[str]) -> dict[str, harness.Figure]:
    """Times, peaks and the goals of one case."""
    seconds, figures = ranks[0]["seconds"], {}
    for name, values in seconds.items():
        note = peers.NOTES.get(name, "")
        figures[f"{case.name}_{name}_ms"] = harness.Figure(1e3 * harness.median(values), "ms", note)
        peak = max(rank["peaks"][name] for rank in ranks)
        figures[f"{case.name}_{name}_peak"] = harness.Figure(peak, "MiB", "per rank")
    for name in ranks[0]["errors"]:
        worst = max(rank["errors"][name] for rank in ranks)
        figures[f"{case.name}_{name}_error"] = harness.Figure(worst, "ratio", "largest of out, dq, dk, dv")
    able = [n for n in peers.PEERS if n in seconds and n not in incorrect]
    best = fastest(seconds, [n for n in seconds if n.startswith("ours_")])
    goal = "goal >= 1.5" if case.pack == "tail" else "goal >= 1"
    if able:
        peer = fastest(seconds, able)
        ratio = harness.paired_ratio(seconds[peer], seconds[best])
        figures[f"{case.name}_speedup"] = harness.Figure(ratio, "ratio", f"{peer} / {best}; {goal}")
    over = harness.paired_ratio(seconds[best], seconds["sdpa"])
    goal = "; goal <= 1.08" if (case.tokens, case.pack) == (16384, "one") else ""
    figures[f"{case.name}_over_sdpa"] = harness.Figure(over, "ratio", f"{best} / sdpa{goal}")
    return figures


def fastest(seconds: dict[str, list[float]], names: list[str]) -> str:
    """The candidate with the lowest median."""
    return min(names, key=lambda name: harness.median(seconds[name]))


def markdown(path: Path) -> str:
    """A result file as the tables of docs/attention.md."""
    result = json.loads(path.read_text())
    found: dict[str, float | None] = {name: figure["value"] for name, figure in result["figures"].items()}
    names = [*(f"ours_{n}" for n in peers.OURS), *peers.PEERS, "sdpa"]
    lines = [
        f"{harness.machine_words(result['machine'])}; commit `{result['commit']}`, {result['date']}.",
        "",
    ]
    for what, unit in (("ms", "Milliseconds"), ("peak", "Peak MiB")):
        more = ["best peer / ours", "ours / sdpa"] if what == "ms" else []
        lines += [f"| {' | '.join([unit, *(n.replace('_', ' ') for n in names), *more])} |"]
        lines += ["|---" * (1 + len(names) + len(more)) + "|"]
        for case in [n.removesuffix("_over_sdpa") for n in found if n.endswith("_over_sdpa")]:
            cells = [_cell(found.get(f"{case}_{name}_{what}"), "{:,.0f}") for name in names]
            ratios = [_cell(found.get(f"{case}_{key}"), "{:.2f}") for key in ("speedup", "over_sdpa")]
            lines.append(f"| {' | '.join([case.replace('_', ' '), *cells, *(ratios if more else [])])} |")
        lines.append("")
    lines += ["| counted | value | |", "|---|---|---|"]
    counted = {n: f for n, f in result["figures"].items() if n.startswith("count_")}
    lines += [
        f"| {n.removeprefix('count_').replace('_', ' ')} | {_cell(f['value'], '{:,.4g}')} {f['unit']} | "
        f"{f.get('note', '')} |"
        for n, f in counted.items()
    ]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main() -> int:
    """Measure and report."""
    flags = harness.parser(__doc__)
    flags.add_argument("--head-dim", type=int, default=16)
    flags.add_argument("--markdown", type=Path, help="only print this result file as tables")
    args = flags.parse_args()
    if args.markdown:
        print(markdown(args.markdown))
        return 0
    todo = cases(quick=args.quick, head_dim=args.head_dim, seed=args.seed)
    ranks = run_ranks(measure, 2, todo, timeout=3600)
    wrong = [rank["errors"] for results in ranks for rank in results]
    incorrect = {name for found in wrong for name, error in found.items() if not error <= CORRECT}
    figures: dict[str, harness.Figure] = {}
    for number, case in enumerate(todo):
        figures |= figures_of(case, [results[number] for results in ranks], incorrect)
    for name, reason in peers.CANNOT.items():
        figures[f"{name}_ms"] = harness.Figure(None, "ms", reason)
    if peers.deepspeed_path() is None:
        figures["deepspeed_ulysses_ms"] = harness.Figure(None, "ms", "deepspeed is not on the path")
    figures |= count(long_tail, seed=args.seed, quick=args.quick)
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
