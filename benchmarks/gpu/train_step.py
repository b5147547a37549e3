"""One GPU: tokens/s, causal MFU and peak memory of a training step, against HF transformers.

Llama-shaped models of about 1B, 3B and 8B parameters with random weights, one document of 8K, 32K
and 128K tokens, forward, backward, clip and AdamW, as far as they fit. The peer is transformers'
LlamaForCausalLM in bf16 with its best attention that is installed, fused AdamW, and gradient
checkpointing only where it does not fit without. Measured in turns; random tokens.
"""

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import torch
import torch.distributed as dist

from longctx.build import Run, World, build
from longctx.config.check import resolve
from longctx.config.load import load
from longctx.data.batch import PackedBatch
from longctx.model.flops import causal_flops
from longctx.train.step import backward
from longctx.train.throughput import peak_flops
from parallel import grads

MODELS = ("llama3.2-1b", "llama3.2-3b", "llama3-8b")
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
ROUNDS = 5
Step = Callable[[], None]


def random_batch(tokens: int, vocab: int, seed: int) -> PackedBatch:
    """One document of random tokens."""
    ids = torch.randint(vocab, (tokens + 1,), generator=torch.Generator().manual_seed(seed))
    return PackedBatch(
        input_ids=ids[:-1],
        targets=ids[1:],
        position_ids=torch.arange(tokens),
        rope_id=torch.zeros(tokens, dtype=torch.int64),
        loss_mask=torch.ones(tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        doc_ids=(0,),
    )


def ours(model: str, tokens: int, seed: int) -> tuple[Step, Run]:
    """Our step on one GPU."""
    folder = tempfile.mkdtemp(prefix="train-step-")
    overrides = [f"run.dir={folder}", "run.device=cuda", "run.device_memory=0", f"data.seq_len={tokens}"]
    overrides += [f"train.global_batch_tokens={tokens}", "train.lr=1e-5"]
    loaded = load(["recipes/quickstart.yaml", f"model/{model}.yaml"], overrides)
    config = resolve(loaded.config, 1, "cuda")
    run = build(config, World(rank=0, size=1, device=torch.device("cuda", 0), store=dist.HashStore()))
    batch = random_batch(tokens, int(run.config.model.vocab_size), seed)

    def step() -> None:
        backward(run, [batch])
        grads.clip_(run.model.parameters(), 1.0, mesh=run.mesh)
        run.optimizer.step()
        run.optimizer.zero_grad()
        torch.cuda.synchronize()

    return step, run


def transformers_step(run_config, tokens: int, seed: int, *, checkpointing: bool) -> Step:
    """The same step with transformers' model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import is_flash_attn_2_available

    c = run_config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.ffn_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        head_dim=c.head_dim,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=tokens,
        tie_word_embeddings=c.tied_embeddings,
        use_cache=False,
        attn_implementation="flash_attention_2" if is_flash_attn_2_available() else "sdpa",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = random_batch(tokens, int(c.vocab_size), seed)
    ids, targets = batch.input_ids.cuda()[None], batch.targets.cuda()[None]

    def step() -> None:
        model(input_ids=ids, labels=targets, shift_labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    return step


def measure(step: Step) -> tuple[float, float]:
    """Median seconds and peak GiB."""
    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = harness.in_turns({"step": step}, rounds=ROUNDS)["step"]
    return harness.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def clear() -> None:
    """Give memory back between candidates."""
    gc.collect()
    torch.cuda.empty_cache()


def attempt(figures: dict, name: str, tokens: int, run_it: Callable[[], tuple[float, float]]) -> None:
    """Measure one candidate, or say that it does not fit."""
    try:
        seconds, gib = run_it()
    except torch.cuda.OutOfMemoryError:
        figures[f"{name}_tokens_per_s"] = harness.Figure(None, "tokens/s", "does not fit")
    else:
        figures[f"{name}_tokens_per_s"] = harness.Figure(tokens / seconds, "tokens/s")
        figures[f"{name}_peak"] = harness.Figure(gib, "GiB", "allocated")
    clear()


def compare(figures: dict, model: str, length: str, seed: int) -> None:
    """Both candidates at one size."""
    tokens, shape = LENGTHS[length], None

    def run_ours() -> tuple[float, float]:
        nonlocal shape
        step, run = ours(model, tokens, seed)
        shape = run.config.model
        try:
            return measure(step)
        finally:
            run.close()

    name = f"{model}_{length}"
    attempt(figures, f"{name}_longctx", tokens, run_ours)
    speed = figures[f"{name}_longctx_tokens_per_s"].value
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16)
    if speed and peak and shape:
        flops = causal_flops(shape, [tokens]) / tokens
        figures[f"{name}_longctx_mfu"] = harness.Figure(speed * flops / peak, "ratio", "causal, no recompute")
    for checkpointing in (False, True) if shape else ():
        label = f"{name}_transformers{'_checkpointed' if checkpointing else ''}"
        attempt(
            figures,
            label,
            tokens,
            lambda c=checkpointing: measure(transformers_step(shape, tokens, seed, checkpointing=c)),
        )
        if figures[f"{label}_tokens_per_s"].value:
            break


def main() -> int:
    """Measure and report."""
    args = harness.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("train_step needs a CUDA device; none is visible")
    figures: dict[str, harness.Figure] = {}
    for model in MODELS[: 1 if args.quick else None]:
        for length in list(LENGTHS)[: 1 if args.quick else None]:
            compare(figures, model, length, args.seed)
    harness.report(__file__, figures, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
