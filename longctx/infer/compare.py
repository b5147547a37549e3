"""One prompt through transformers and through ours: equal logits, or the first layer that differs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.fsdp import forward_only
from parallel.layout import SequenceLayout

from ..errors import ConfigError
from ..hf.added import vocabulary_size
from ..hf.folder import CONFIG, TOKENIZER
from ..hf.source import Source
from ..model.params import vocab_rows
from .loaded import Loaded, alone, load_model

TOLERANCE = 1e-4
"""Largest difference / largest logit, float32; tiny models stay below 1e-5."""
PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the two sides computed."""

    logits_error: float
    """max|a-b| / max|b| of the logits."""
    first_layer: str | None
    """The first part whose output differs by more than the tolerance; None: all are equal."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.first_layer is None


def compare(source: Source, folder: Path, *, seed: int = 0) -> Comparison:
    """Compare logits and every layer's output on random tokens, in float32 on the CPU.

    Args:
        source: ours.
        folder: the Hugging Face folder; the whole model is loaded by transformers.
        seed: of the tokens.

    Raises:
        ConfigError: transformers is not installed or cannot load the folder.
    """
    rows = _common_rows(source, folder)
    ids = torch.randint(rows, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed))
    theirs = _theirs(folder, ids)
    loaded = load_model(source, alone(torch.device("cpu")), torch.float32)
    try:
        ours = _ours(loaded, ids)
    finally:
        loaded.close()
    for side in (ours, theirs):
        side["logits"] = side["logits"][:, :rows]
    differing = [name for name in ours if not _error(ours[name], theirs[name]) <= TOLERANCE]
    return Comparison(
        logits_error=_error(ours["logits"], theirs["logits"]),
        first_layer=differing[0] if differing else None,
    )


def _common_rows(source: Source, folder: Path) -> int:
    """Ids that both sides know; rows behind their tokenizer's may be new tokens of ours."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rows = min(vocab_rows(source.model), int(config["vocab_size"]))
    tokenizer = folder / TOKENIZER
    return min(rows, vocabulary_size(tokenizer)) if tokenizer.is_file() else rows


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def _theirs(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("--verify needs transformers; install longctx-runtime[hf]") from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {folder}: {error}") from error
    outputs = _watch(model.eval().model.layers)
    logits = model(ids[None]).logits[0]
    return {**outputs, "logits": logits}


def _ours(loaded: Loaded, ids: Tensor) -> dict[str, Tensor]:
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    layout = SequenceLayout.build(cu_seqlens, ring=1, ulysses=1, ring_rank=0, ulysses_rank=0)
    outputs = _watch(list(loaded.model.layers.values()))
    with forward_only(loaded.model):
        logits = loaded.model(ids, torch.arange(len(ids)), layout=layout)
    return {**outputs, "logits": logits}


def _watch(layers: Any) -> dict[str, Tensor]:
    """Layer outputs [t, E] by name, filled when the model runs."""
    outputs: dict[str, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, arguments: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            outputs[f"layer {number}"] = first.detach().reshape(-1, first.shape[-1]).clone()

        return hook

    for number, layer in enumerate(layers):
        layer.register_forward_hook(keep(number))
    return outputs
