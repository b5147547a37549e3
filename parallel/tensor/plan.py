"""Which matrix is split how, by rule from the structure of a module; no plan per architecture.

Rule 1: in a module with several matrices of its own, all but the last read the residual stream and
are split by output rows ("columns" of y = x A; whole heads stay together), the last writes to the
stream and is split by inputs.
Rule 2: outside the blocks, the embedding and the head are split along the vocabulary.
Everything with fewer than two dims outside those matrices (norms) stays whole.

Source: Redco (Tan et al. 2023), sec. 3.1; Megatron-LM (Shoeybi et al. 2019), sec. 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A module that needs all tokens and holds a share of the heads or of the inner width."""

    name: str
    """Path of the module below the block."""
    columns: tuple[str, ...]
    """Children split by output rows."""
    shared: tuple[str, ...]
    """Children with fewer heads than ranks: stored whole, each rank computes the one head it uses."""
    row: str
    """The child split by inputs, whose results are summed over the ranks."""


def regions(block: nn.Module, tp: int) -> Iterator[Region]:
    """The split modules of a block.

    Args:
        block: one repeated block of the model.
        tp: tensor-parallel ranks.

    Raises:
        ConfigError: a width that `tp` does not divide, or a matrix that no rule covers.
    """
    covered: set[str] = set()
    for name, module in block.named_modules():
        matrices = {child: m for child, m in module.named_children() if isinstance(m, nn.Linear)}
        if len(matrices) > 1:
            yield _region(name, module, matrices, tp)
            covered |= {f"{name}.{child}.weight".lstrip(".") for child in matrices}
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1 and name not in covered:
            raise ConfigError(
                f"parallel.tp={tp}: no rule splits {name} {tuple(parameter.shape)}; a module with several "
                "nn.Linear children is split by all but the last, then the last; set parallel.tp=1"
            )


def _region(name: str, module: nn.Module, matrices: dict[str, nn.Linear], tp: int) -> Region:
    *first, row = matrices
    stream, unit = matrices[first[0]].in_features, int(getattr(module, "head_dim", 1))
    for child in first:
        if matrices[child].in_features != stream or matrices[row].out_features != stream:
            raise ConfigError(
                f"parallel.tp={tp}: {name} does not read and write the same stream of {stream} channels "
                f"({child} reads {matrices[child].in_features}, {row} writes {matrices[row].out_features}); "
                "set parallel.tp=1"
            )
    heads = {child: matrices[child].out_features // unit for child in first}
    shared = tuple(child for child, count in heads.items() if count % tp and tp % count == 0 and unit > 1)
    for child, count in heads.items():
        if count % tp and child not in shared:
            what = "heads" if unit > 1 else "rows"
            raise ConfigError(
                f"parallel.tp={tp} must divide the {count} {what} of {name}.{child}; "
                f"choose one of {[d for d in range(1, count + 1) if count % d == 0]}"
            )
    if matrices[row].in_features % tp:
        raise ConfigError(
            f"parallel.tp={tp} must divide the {matrices[row].in_features} inputs of {name}.{row}"
        )
    columns = tuple(child for child in first if child not in shared)
    return Region(name=name, columns=columns, shared=shared, row=row)
