"""Operations that the losses share: unit rows, and symmetric products Z'GZ with one product in backward."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.distributed import all_reduce_replicated, all_reduce_sum, world_size
from ssl_runner.relation import Relation, Views

MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-12, 1e16  # rows whose float32 norms F.normalize computes
# A stripe is a block of rows of a K x K matrix, from the diagonal to the last column.
STRIPE = {"cpu": 128}  # rows per stripe: small on a CPU, to fit into its caches
STRIPE_ELSEWHERE = 2048  # large products are faster on a GPU


def unit_rows(Z: Tensor) -> Tensor:
    """Z (N, K) with rows of norm 1. A zero row stays zero, and its gradient is finite.

    F.normalize is wrong where the norm is below its eps or its square overflows. Rows of such magnitude are
    divided by their largest entry first; all others are multiplied by 1.
    """
    with torch.no_grad():
        largest = torch.linalg.vector_norm(Z, torch.inf, 1, keepdim=True)
        in_range = ((largest > MIN_MAGNITUDE) & (largest < MAX_MAGNITUDE)) | (largest == 0)
        inverse = largest.clamp(min=torch.finfo(Z.dtype).tiny).reciprocal()
        scale = torch.where(in_range, torch.ones_like(largest), inverse)
    return F.normalize(Z * scale)


def column_products(Z: Tensor, GZ: Tensor) -> Tensor:
    """Z (N, K) and constant GZ (N, K), for a symmetric G -> sum_i z_ik (GZ)_ik for each k, (K,).

    The gradient with respect to Z is 2 GZ.
    """
    return _ColumnProducts.apply(Z, GZ)


@torch.no_grad()
def column_means(Z: Tensor) -> Tensor:
    """Means (K,) of the columns of Z over the rows of all ranks, without gradient."""
    return all_reduce_sum(Z.mean(0)) / world_size()


def invariance(Z: Tensor, G: Relation) -> Tensor:
    """1/N sum_ij G_ij |z_i - z_j|^2 = 2/N tr(Z'LZ) over the rows of all ranks, with L = D - G.

    Centre Z (N, K) first: it changes neither value nor gradient, but large means would cancel.
    """
    with torch.no_grad():
        LZ = G.degrees.to(Z)[:, None] * Z - G @ Z
    return 2 / (world_size() * len(Z)) * all_reduce_replicated(column_products(Z, LZ).sum())


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a backward that is not differentiable: with `create_graph=True` it raises RuntimeError.

    torch's once_differentiable raises only if the upstream gradient requires a gradient. Otherwise a second
    derivative would silently omit the contribution of this function.
    """

    @wraps(backward)
    def checked(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: expected False; leave it out, as the losses have no second derivative"
            )
        return backward(ctx, *upstream)

    return checked


class _ColumnProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Z: Tensor, GZ: Tensor) -> Tensor:
        ctx.save_for_backward(GZ)
        return (Z * GZ).sum(0)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (GZ,) = ctx.saved_tensors
        return 2 * upstream * GZ, None


class SymmetricProduct:
    """Z'GZ (K, K) over the rows of all ranks, computed in stripes of its upper half. For Z'Z, pass GZ = Z.

    The caller may modify a stripe in place before it takes the next one. Each stripe, as modified, is copied
    and mirrored into `matrix` (K, K), which is complete at the end of the iteration.
    """

    def __init__(self, Z: Tensor, GZ: Tensor, G: Relation | None = None):
        self.Z, self.GZ, self.K = Z, GZ, Z.shape[1]
        self.matrix = Z.new_empty(self.K, self.K)
        self.pairs = type(G) is Views and G.V == 2  # not isinstance: a subclass may override the product

    def stripes(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows k, columns m and the stripe (b, K - k.start) of their entries.

        A stripe is a square block on the diagonal, b x b, followed by all columns to the right of it.
        """
        step = STRIPE.get(self.Z.device.type, STRIPE_ELSEWHERE)
        n = len(self.Z) // 2
        AB = self.Z[:n].T @ self.GZ[:n] if self.pairs else None  # Z'GZ = A'B + B'A for the two views A and B
        for start in range(0, self.K, step):
            k, m = slice(start, min(start + step, self.K)), slice(start, self.K)
            stripe = self.Z[:, k].T @ self.GZ[:, m] if AB is None else AB[k, m] + AB[m, k].T
            stripe = all_reduce_sum(stripe)
            yield k, m, stripe
            self.matrix[k, m] = stripe
            self.matrix[k.stop :, k] = stripe[:, len(stripe) :].T


def stripe_square_sum(stripe: Tensor) -> Tensor:
    """Sum of squares of a stripe and its mirror image: entries outside the diagonal block count twice."""
    b = len(stripe)
    return stripe[:, :b].square().sum() + 2 * stripe[:, b:].square().sum()
