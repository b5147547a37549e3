"""How fast steps come out of the token store, and what that adds to a training step.

Alone: tokens per second of one process, one thread, from the page cache, from the seed to tensors (drawing,
packing, reading, shifting targets, vocabulary check), for whole documents and for two curricula, on a
store of log-normal document lengths (mu = ln 347, sigma 1.48, Wikipedia's) and 50,257 ids (goal >= 20M
tokens/s). In training: seconds that a step waits for its batch over seconds of the step, with the
quickstart's model on one process (goal < 1%).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch

from longctx.config.schema import CurriculumConfig, DataConfig
from longctx.data.batch import build_batch
from longctx.data.loader import Packs, step_packs
from longctx.data.mixture import make_mixture
from longctx.data.sources import Opened
from longctx.data.store import RECORD, Store
from longctx.data.writer import Documents, write_store

VOCAB = 50257
STEP_TOKENS, PACK_TOKENS = 64 * 8192, 8192
DATA = DataConfig(seq_len=8192, min_len=256)


def make_store(folder: Path, documents: int, seed: int) -> Opened:
    """A store of random tokens in documents of log-normal lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.floor(rng.lognormal(np.log(347), 1.48, documents)).astype(np.int64) + 2
    tokens = rng.integers(0, VOCAB, lengths.sum())
    part = Documents(tokens=tokens, lengths=lengths, records=np.zeros(documents, dtype=RECORD))
    meta = {"tokenizer": {"name": "none", "fingerprint": "none", "vocab_size": VOCAB, "eos_id": 0}}
    write_store(
        str(folder / "s"),
        [part],
        vocab_size=VOCAB,
        files=["none"],
        meta=lambda: meta | {"num_skipped": 0, "skipped": []},
    )
    everyone = np.arange(documents)
    return Opened(
        tokens=Store(str(folder / "s")),
        train_docs=everyone,
        held_out_docs=everyone[:0],
        source=np.zeros(documents, dtype=np.int64),
        names=("data",),
        vocab_size=VOCAB,
        tokenizer=None,
    )


def packs_of(opened: Opened, kind: str, seed: int) -> Packs:
    """The steps of one way to draw."""
    if kind == "documents":
        return step_packs(
            opened.tokens,
            opened.train_docs,
            DATA,
            seed=seed,
            microbatch_tokens=PACK_TOKENS,
            global_batch_tokens=STEP_TOKENS,
        )
    curriculum = CurriculumConfig(kind=kind)  # type: ignore[arg-type]
    return make_mixture(opened, DATA, curriculum, seed=seed, tokens=(PACK_TOKENS, STEP_TOKENS), steps=1000)


class Reader:
    """Reads step after step of one way to draw."""

    def __init__(self, opened: Opened, packs: Packs, steps: int) -> None:
        self.opened, self.packs, self.steps, self.next = opened, packs, steps, 0
        self.tokens: list[int] = []

    def __call__(self) -> None:
        """Read some steps whole."""
        tokens = 0
        for step in range(self.next, self.next + self.steps):
            batches = [build_batch(self.opened.tokens, p, vocab_size=VOCAB) for p in self.packs.packs(step)]
            tokens += sum(batch.num_tokens for batch in batches)
        self.next += self.steps
        self.tokens.append(tokens)


def alone(args) -> dict[str, harness.Figure]:
    """Tokens per second of each way to draw, in turns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        opened = make_store(Path(folder), 2_000 if args.quick else 40_000, args.seed)
        opened.tokens.document(0)
        kinds = ("documents", "natural", "grow-p2")
        steps = 1 if args.quick else 4
        readers = {kind: Reader(opened, packs_of(opened, kind, args.seed), steps) for kind in kinds}
        seconds = harness.in_turns(readers, rounds=2 if args.quick else 9)
        figures = {}
        for kind, reader in readers.items():
            rates = [n / s / 1e6 for n, s in zip(reader.tokens[1:], seconds[kind], strict=True)]
            note = f"one process, one thread; best {max(rates):.0f}, worst {min(rates):.0f}; goal >= 20"
            figures[f"{kind}_mtokens_per_s"] = harness.Figure(harness.median(rates), "Mtokens/s", note)
        return figures


def in_training(args) -> dict[str, harness.Figure]:
    """Wait for data as a share of the step, in a run of the command line."""
    steps = 3 if args.quick else 15
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "longctx",
            "train",
            "recipes/quickstart.yaml",
            f"run.dir={folder}/run",
        ]
        command += ["run.processes=1", "run.device=cpu", f"run.seed={args.seed}", f"train.steps={steps}"]
        command += [
            "curriculum.kind=grow-p2",
            "data.min_len=256",
            "train.eval_every=0",
            "train.eval_tokens=1k",
        ]
        lengths = (1024, 1024) if args.quick else (16384, 8192)
        command += [f"train.global_batch_tokens={lengths[0]}", f"train.microbatch_tokens={lengths[1]}"]
        command += [f"data.seq_len={lengths[1]}"]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    shares = [row["data_wait_s"] / row["step_time_s"] for row in rows[1:]]
    note = f"median of {len(shares)} steps, largest {max(shares):.2%}; goal < 1%"
    step_ms = harness.median([row["step_time_s"] for row in rows[1:]]) * 1e3
    took = f"{time.perf_counter() - started:.0f} s in all"
    return {
        "wait_share_of_step": harness.Figure(harness.median(shares), "ratio", note),
        "step_time": harness.Figure(
            step_ms, "ms", f"{lengths[0]:,} tokens, quickstart's model, one process; {took}"
        ),
    }


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    harness.report(__file__, alone(args) | in_training(args), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
