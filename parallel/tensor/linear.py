"""Matrices of which each tp rank holds a part: DTensors for storage, plain tensors in the computation.

Shapes: t = tokens of the data rank, n = rows of one tp rank, E = width of the stream, R = tp ranks.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ..mesh import Mesh
from .tokens import ScatterTokens


def local(parameter: Tensor) -> Tensor:
    """This rank's part as a plain tensor; a whole parameter as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split_parameter(whole: Tensor, dim: int, mesh: Mesh) -> nn.Parameter:
    """This rank's chunk of a parameter along `dim`, as a parameter that knows the whole's shape.

    The chunks are torch's: ceil(size / R) each, the last ones smaller or empty.
    """
    size, rank = mesh.size("tp"), mesh.coordinate("tp")
    chunk = -(-whole.shape[dim] // size)
    first = min(chunk * rank, whole.shape[dim])
    part = whole.detach().narrow(dim, first, min(chunk, whole.shape[dim] - first)).contiguous()
    if whole.device.type != "meta":
        part = part.clone()
    stored = DTensor.from_local(
        part, mesh.tp_mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return nn.Parameter(stored, requires_grad=whole.requires_grad)


def _product(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    return F.linear(x, weight(), bias)


Product = Callable[[Tensor, Callable[[], Tensor], Tensor | None], Tensor]
"""(x, weight as it is when called, bias) -> x weight^T + bias."""


class SplitLinear(nn.Module):
    """A matrix of which this tp rank uses a part. `product` multiplies by it, and may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.product: Product = _product


class ColumnLinear(SplitLinear):
    """Output rows split over tp: [t, E] -> [t, out / R]; the caller has gathered the tokens."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        self.weight = split_parameter(whole.weight, 0, mesh)
        self.bias = None if whole.bias is None else split_parameter(whole.bias, 0, mesh)

    def forward(self, x: Tensor) -> Tensor:
        """[t, E] -> [t, out / R]."""
        bias = None if self.bias is None else local(self.bias)
        return self.product(x, lambda: local(self.weight), bias)


class SharedLinear(SplitLinear):
    """Fewer heads than ranks: stored whole, each rank computes the head that its queries use.

    R / K neighbouring ranks share one of the K heads. Gradients are summed over tp with those of
    the other whole parameters.
    """

    def __init__(self, whole: nn.Linear, head_dim: int, mesh: Mesh) -> None:
        super().__init__()
        self.weight, self.bias = whole.weight, whole.bias
        heads = whole.out_features // head_dim
        first = mesh.coordinate("tp") * heads // mesh.size("tp") * head_dim
        self.rows = slice(first, first + head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[t, E] -> [t, D]."""
        bias = None if self.bias is None else self.bias[self.rows]
        return self.product(x, lambda: self.weight[self.rows], bias)


class RowLinear(SplitLinear):
    """Inputs split over tp; the partial results are summed while tokens are divided."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        self.weight = split_parameter(whole.weight, 1, mesh)
        self.bias = whole.bias
        self.scatter = ScatterTokens(mesh.group("tp"))

    def forward(self, x: Tensor) -> Tensor:
        """[t, in / R] -> [n, E]."""
        y: Tensor = self.scatter(self.product(x, lambda: local(self.weight), None))
        return y if self.bias is None else y + self.bias
