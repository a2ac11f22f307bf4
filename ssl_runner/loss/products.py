"""Products of Z with itself whose symmetry the losses use: half of Z'GZ is computed, and one matrix product goes back."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ssl_runner.distributed import summed
from ssl_runner.relation import Relation, Views

STRIPE = {"cpu": 128}  # rows of a K x K matrix taken at a time: on a CPU few, so that its caches hold them
STRIPE_ELSEWHERE = 2048  # a GPU wants large products


def column_products(Z: Tensor, GZ: Tensor) -> Tensor:
    """Z (N, K) and GZ, a constant, with G symmetric -> sum_i z_ik (GZ)_ik for every k, (K,). Back goes 2 GZ."""
    return _ColumnProducts.apply(Z, GZ)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is not itself differentiable and refuses `create_graph=True`. torch's once_differentiable does so only
    where what comes from upstream has a gradient; elsewhere the second derivative would lack a part."""

    @wraps(backward)
    def refusing(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the losses have no second derivative: leave out create_graph=True")
        return backward(ctx, *upstream)

    return refusing


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


class Symmetric:
    """Z'GZ (K, K) over the rows of all processes, a stripe of its upper half at a time: what the reader makes of the stripes
    is mirrored into `matrix`. Without G it is Z'Z."""

    def __init__(self, Z: Tensor, GZ: Tensor, G: Relation | None = None):
        self.Z, self.GZ, self.K = Z, GZ, Z.shape[1]
        self.matrix = Z.new_empty(self.K, self.K)
        self.pairs = type(G) is Views and G.V == 2  # a subclass may have a product of its own

    def stripes(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows k and columns m of the matrix, and what is there: a square block on the diagonal and all that is right of it."""
        step = STRIPE.get(self.Z.device.type, STRIPE_ELSEWHERE)
        n = len(self.Z) // 2
        AB = self.Z[:n].T @ self.GZ[:n] if self.pairs else None  # Z'GZ = A'B + B'A, of two views A and B
        for start in range(0, self.K, step):
            k, m = slice(start, min(start + step, self.K)), slice(start, self.K)
            stripe = self.Z[:, k].T @ self.GZ[:, m] if AB is None else AB[k, m] + AB[m, k].T
            stripe = summed(stripe)
            yield k, m, stripe
            self.matrix[k, m] = stripe
            self.matrix[k.stop :, k] = stripe[:, len(stripe) :].T


def square_sum(stripe: Tensor) -> Tensor:
    """The sum of the squares that a stripe stands for: its square block once, what is right of it also for what is below."""
    b = len(stripe)
    return stripe[:, :b].square().sum() + 2 * stripe[:, b:].square().sum()
