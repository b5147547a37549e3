"""Replace a model's matrices by split ones, in place, following the rules of `plan`."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..comm import Group
from ..errors import ConfigError
from ..layout import SequenceLayout
from ..mesh import Mesh
from ..noise import TokenNoise
from .linear import ColumnLinear, RowLinear, SharedLinear
from .plan import Region, regions
from .tokens import GatherTokens
from .vocabulary import VocabEmbedding, VocabHead


def split(model: nn.Module, blocks: Iterable[nn.Module], *, mesh: Mesh) -> None:
    """Split every matrix of `model` over the tp ranks; with one of them nothing happens.

    Blocks then take and give this tp rank's rows [n, E] of the t tokens; `model` itself takes all
    t token ids and gives logits [t, v] for its part of the vocabulary.

    Args:
        model: the root, with embedding and head outside the blocks; parameters whole or on meta.
        blocks: its repeated blocks.
        mesh: the world.

    Raises:
        ConfigError: a width that tp does not divide, or a matrix that no rule covers.

    Cost:
        Per block and direction 2 all-gathers and 2 reduce-scatters of (R - 1) n E elements a rank.
    """
    if mesh.size("tp") == 1:
        return
    inside = set()
    for block in blocks:
        inside |= set(block.modules())
        for region in list(regions(block, mesh.size("tp"))):
            _split_region(block.get_submodule(region.name), region, mesh)
    _split_vocabulary(model, inside, mesh)
    model.register_forward_pre_hook(partial(_noise_of_rows, mesh.group("tp")), with_kwargs=True)
    model.register_forward_hook(_without_padding, with_kwargs=True)


def _split_region(module: nn.Module, region: Region, mesh: Mesh) -> None:
    for child in region.columns:
        setattr(module, child, ColumnLinear(module.get_submodule(child), mesh))  # type: ignore[arg-type]
    for child in region.shared:
        whole = module.get_submodule(child)
        setattr(module, child, SharedLinear(whole, int(module.head_dim), mesh))  # type: ignore[arg-type]
    setattr(module, region.row, RowLinear(module.get_submodule(region.row), mesh))  # type: ignore[arg-type]
    module.gather_tokens = GatherTokens(mesh.group("tp"))
    module.register_forward_pre_hook(_gather_input)


def _gather_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # A module that is told the layout works on exactly its tokens; any other on padded rows.
    layouts = [a for a in args if isinstance(a, SequenceLayout)]
    rows = len(layouts[0].token_index) if layouts else None
    return (module.gather_tokens(args[0], rows), *args[1:])  # type: ignore[operator]


def _split_vocabulary(model: nn.Module, inside: set[nn.Module], mesh: Mesh) -> None:
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Embedding):
            setattr(model, name, VocabEmbedding(module, mesh))
        elif isinstance(module, nn.Linear):
            setattr(model, name, VocabHead(module, mesh))
        elif not inside & set(module.modules()):
            for inner, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    raise ConfigError(
                        f"parallel.tp={mesh.size('tp')}: no rule splits {name}.{inner} "
                        f"{tuple(parameter.shape)} outside the blocks; set parallel.tp=1"
                    )


def _noise_of_rows(
    group: Group, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Between the matrices a rank holds the rows n of its tokens t: it drops from those.
    layout = kwargs.get("layout")
    count = -(-(len(args[0]) if layout is None else len(layout.token_index)) // group.size)
    rows = {k: v.rows(group.rank * count, count) for k, v in kwargs.items() if isinstance(v, TokenNoise)}
    return args, kwargs | rows


def _without_padding(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor
) -> Tensor:
    # A model that is told the layout may have been given another tp rank's share of the stream.
    layout = kwargs.get("layout")
    rows = len(args[0]) if layout is None else len(layout.token_index)
    if len(logits) < rows:
        return logits  # the stream, not logits
    # A copy: FSDP hangs its backward hook on the output, which must not be a view.
    return logits if len(logits) == rows else logits[:rows].clone()
