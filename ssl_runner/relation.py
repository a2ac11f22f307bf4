"""The relation G between the N rows of X, as an operator: a loss needs `G @ Z` and the degrees, never an N x N matrix."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_runner.distributed import collect, pooled, summed


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Relation(ABC):
    """G (N, N): symmetric, zero diagonal, G_ij > 0 iff rows i and j are positives of each other.

    `degrees` (N,) holds d_i = sum_j G_ij. A *normalized* relation divides G_ij by sqrt(d_i d_j), so that sum_ij G_ij no
    longer grows with the number of views or of positives; where related rows have one degree, each row then sums to 1.
    """

    num_rows: int
    degrees: Tensor
    support: Tensor | None = (
        None  # rows (m, K) that G relates beside those of the batch: constants that Z ends with
    )

    def __matmul__(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K), differentiable in Z. Raises ValueError when Z has another number of rows."""
        if Z.ndim != 2 or len(Z) != self.num_rows:
            raise ValueError(
                f"G relates {self.num_rows} rows and needs Z of shape ({self.num_rows}, K), not {tuple(Z.shape)}"
            )
        return self._product(Z)

    @abstractmethod
    def _product(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K)."""

    @abstractmethod
    def edges(self) -> Tensor:
        """The ordered pairs (i, j) with G_ij > 0, in both directions, sorted: (2, E) int64."""

    def weights(self) -> Tensor:
        """G_ij of the pairs that `edges` lists: (E,) float64, on the host."""
        return torch.ones(self.edges().shape[1], dtype=torch.float64)

    @property
    def square_norm(self) -> Tensor:
        """sum_ij G_ij^2, a scalar."""
        return double(self.degrees).sum()  # entries are 0 or 1

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """G as an (N, N) matrix, for theory, tests and pictures; a training step never needs it."""
        return self @ torch.eye(
            self.num_rows, dtype=dtype or torch.get_default_dtype(), device=self.degrees.device
        )


class Views(Relation):
    """Rows i != j are positives iff they are views of one original: G = (11' - I)_V (x) I_n, rows view-major.

    n originals, V >= 2 views each, N = V n; row v n + k is view v of original k. `G @ Z` costs O(N K) whatever V is.
    """

    def __init__(self, n: int, V: int, normalized: bool = False, device: torch.device | str | None = None):
        if n < 1 or V < 2:
            raise ValueError(f"Views needs n >= 1 originals and V >= 2 views, not n={n}, V={V}")
        self.n, self.V, self.num_rows = n, V, n * V
        self.weight = 1 / (V - 1) if normalized else 1.0
        self.degrees = torch.full(
            (self.num_rows,), 1.0 if normalized else V - 1.0, dtype=torch.float32, device=device
        )

    def _product(self, Z: Tensor) -> Tensor:
        views = Z.reshape(self.V, self.n, -1)
        GZ = (views.flip(0) if self.V == 2 else views.sum(0) - views).reshape(self.num_rows, -1)
        return GZ if self.weight == 1 else self.weight * GZ

    def edges(self) -> Tensor:
        rows = torch.arange(self.num_rows, device=self.degrees.device)
        shifts = torch.arange(1, self.V, device=rows.device) * self.n
        others = ((rows[:, None] + shifts) % self.num_rows).sort(dim=1).values
        return torch.stack([rows.repeat_interleave(self.V - 1), others.flatten()])

    def weights(self) -> Tensor:
        return torch.full((self.num_rows * (self.V - 1),), self.weight, dtype=torch.float64)

    @property
    def square_norm(self) -> Tensor:
        return self.weight * double(self.degrees).sum()


class Labels(Relation):
    """Rows i != j are positives iff they have the same label (supervised SSL). y (N,) integers >= 0.

    `G @ Z` is the class sum minus the row itself: O(N K); CUDA takes the sums in any order, so its last bits vary there. Where
    `num_classes` is known, giving it saves a host-device sync. Of several processes each has its own rows, whose positives lie
    in all of them: what is exchanged are the class sums, and `edges` and `dense` show this process's rows only.
    """

    def __init__(self, y: Tensor, num_classes: int | None = None, normalized: bool = False):
        if y.ndim != 1 or y.is_floating_point() or y.numel() == 0:
            raise ValueError(
                f"Labels needs a non-empty vector of integers, not shape {tuple(y.shape)} of {y.dtype}"
            )
        if num_classes is None:
            if y.min() < 0:
                raise ValueError(
                    f"Labels needs labels >= 0, and the smallest is {y.min()}: leave out rows without a label"
                )
            num_classes = max(collect(int(y.max()) + 1))
        self.y, self.num_rows, self.num_classes, self.normalized = y.long(), len(y), num_classes, normalized
        ones = torch.ones(self.num_rows, dtype=torch.float32, device=y.device)
        self.positives = (
            summed(torch.zeros(num_classes, device=y.device).index_add_(0, self.y, ones))[self.y] - 1
        )
        self.degrees = self.positives.clamp(max=1) if normalized else self.positives

    def _product(self, Z: Tensor) -> Tensor:
        sums = pooled(Z.new_zeros(self.num_classes, Z.shape[1]).index_add(0, self.y, Z))
        GZ = sums[self.y] - Z
        return GZ / self.positives.clamp(min=1)[:, None].to(Z.dtype) if self.normalized else GZ

    def edges(self) -> Tensor:
        same = self.y[:, None] == self.y
        return same.fill_diagonal_(False).nonzero().T

    def weights(self) -> Tensor:
        positives = self.positives[self.edges()[0]].cpu().double()
        return 1 / positives if self.normalized else torch.ones_like(positives)

    @property
    def square_norm(self) -> Tensor:
        degrees = double(self.degrees)
        return (degrees / self.positives.clamp(min=1)).sum() if self.normalized else degrees.sum()


class Edges(Relation):
    """Any relation given by its pairs: i, j (E,) integers in 0 .. num_rows - 1, in either or both directions.

    Pairs are made symmetric and count once each; i = j is refused. `G @ Z` is a sparse product in O(E K).
    """

    def __init__(self, i: Tensor, j: Tensor, num_rows: int):
        i, j = torch.as_tensor(i), torch.as_tensor(j)
        if len(i) and (i.is_floating_point() or j.is_floating_point()):
            raise ValueError(f"Edges needs integers, not {i.dtype} and {j.dtype}")
        i, j = i.long(), j.long()
        if i.shape != j.shape or i.ndim != 1:
            raise ValueError(
                f"Edges needs two vectors of one length, not shapes {tuple(i.shape)} and {tuple(j.shape)}"
            )
        if len(i):
            low, high = min(i.min(), j.min()), max(i.max(), j.max())
            if low < 0 or high >= num_rows:
                raise ValueError(
                    f"Edges of {num_rows} rows needs indices from 0 to {num_rows - 1}, not {low} to {high}"
                )
        if (i == j).any():
            raise ValueError(
                f"Edges: row {i[i == j][0]} is paired with itself; a row is never its own positive"
            )
        self.num_rows = num_rows
        codes = torch.unique(torch.cat([i * num_rows + j, j * num_rows + i]))
        self.pairs = torch.stack([codes // num_rows, codes % num_rows])
        self.degrees = torch.bincount(self.pairs[0], minlength=num_rows).to(torch.float32)

    def _product(self, Z: Tensor) -> Tensor:
        ones = Z.new_ones(self.pairs.shape[1])
        shape = (self.num_rows, self.num_rows)
        G = torch.sparse_coo_tensor(
            self.pairs.to(Z.device), ones, shape, is_coalesced=True, check_invariants=False
        )
        return _SymmetricProduct.apply(G, Z)

    def edges(self) -> Tensor:
        return self.pairs

    def to(self, device: torch.device) -> "Edges":
        """The same relation on a device; the host does not wait for the copy."""
        self.pairs, self.degrees = copied(self.pairs, device), copied(self.degrees, device)
        return self


class _SymmetricProduct(torch.autograd.Function):
    """A symmetric sparse G, a constant, times Z. torch.sparse.mm would go back through G', which it sorts first, and on CUDA
    the host waits for that. But G' is G."""

    @staticmethod
    def forward(ctx: Any, G: Tensor, Z: Tensor) -> Tensor:
        ctx.G = G
        return torch.sparse.mm(G, Z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _SymmetricProduct.apply(ctx.G, gradient)


class Nearest(Relation):
    """Rows are positives iff one of them is among the other's k nearest: neighbors (n, k), row i's nearest rows, none of them i
    and none twice. `G @ Z` is O(n k K) and, unlike a sparse matrix that is made symmetric, makes the device wait for nothing."""

    def __init__(self, neighbors: Tensor):
        self.num_rows, self.k = neighbors.shape
        self.neighbors = neighbors
        own = torch.arange(self.num_rows, device=neighbors.device)[:, None, None]
        self.one_sided = 1 - (neighbors[neighbors] == own).any(2).to(
            torch.float32
        )  # (n, k): 0 where the other has i as well
        self.degrees = self._product(torch.ones(self.num_rows, 1, device=neighbors.device))[:, 0]

    def _product(self, Z: Tensor) -> Tensor:
        one_sided = self.one_sided[..., None].to(Z.dtype)
        there = Z[self.neighbors].sum(1)
        back = (one_sided * Z[:, None]).flatten(0, 1)
        return there + torch.zeros_like(Z).index_add(0, self.neighbors.flatten(), back)

    def edges(self) -> Tensor:
        own = torch.arange(self.num_rows, device=self.neighbors.device).repeat_interleave(self.k)
        return Edges(own, self.neighbors.flatten(), self.num_rows).edges()


class Originals(Relation):
    """A relation A (n, n) between originals, carried to V views of each: rows i != j are positives iff they are views of one
    original or A relates their originals. G = (11' - I)_V (x) I_n + 11'_V (x) A, rows view-major."""

    def __init__(self, A: Relation, V: int):
        self.A, self.V, self.n, self.num_rows = A, V, A.num_rows, A.num_rows * V
        self.degrees = (V - 1 + V * A.degrees).repeat(V)

    def _product(self, Z: Tensor) -> Tensor:
        views = Z.reshape(self.V, self.n, -1)
        sums = views.sum(0)
        return (sums + self.A @ sums - views).reshape(self.num_rows, -1)

    def edges(self) -> Tensor:
        i, j = self.A.edges()
        a, b = torch.cartesian_prod(*[torch.arange(self.V, device=i.device)] * 2).T[..., None] * self.n
        across = torch.stack([(a + i).flatten(), (b + j).flatten()])
        pairs = torch.cat([across, Views(self.n, self.V, device=i.device).edges()], 1)
        return pairs[:, (pairs[0] * self.num_rows + pairs[1]).argsort()]


class Supported(Relation):
    """Views of n originals, each of which is also a positive of k support rows of its own: the last n k rows of Z, which are
    constants (NNCLR's nearest neighbours in a queue, Dwibedi et al. 2021). Row V n + i k + a supports original i."""

    def __init__(self, n: int, V: int, support: Tensor):
        self.views, self.n, self.V, self.support = Views(n, V, device=support.device), n, V, support
        self.num_rows, self.k = n * V + len(support), len(support) // n
        self.degrees = torch.cat([self.views.degrees + self.k, self.views.degrees.new_full((n * self.k,), V)])

    def _product(self, Z: Tensor) -> Tensor:
        Z, support = Z[: self.views.num_rows], Z[self.views.num_rows :]
        sums = Z.reshape(self.V, self.n, -1).sum(0)
        supporting = support.reshape(self.n, self.k, -1).sum(1).repeat(self.V, 1)
        return torch.cat([self.views @ Z + supporting, sums.repeat_interleave(self.k, 0)])

    def edges(self) -> Tensor:
        rows = torch.arange(self.views.num_rows, device=self.degrees.device)
        support = (
            self.views.num_rows + (rows % self.n * self.k)[:, None] + torch.arange(self.k, device=rows.device)
        )
        i, j = torch.cat(
            [self.views.edges(), torch.stack([rows.repeat_interleave(self.k), support.flatten()])], 1
        )
        return Edges(i, j, self.num_rows).edges()


class Normalized(Relation):
    """D^-1/2 G D^-1/2 of a relation whose entries are 0 or 1; rows without a positive stay zero."""

    def __init__(self, G: Relation):
        self.G, self.num_rows, self.support = G, G.num_rows, G.support
        degrees = double(G.degrees)
        self.scale = (degrees > 0) * degrees.clamp(
            min=1
        ).rsqrt()  # torch.where with a 0 would make the host wait on CUDA
        self.degrees = self._product(torch.ones_like(self.scale)[:, None])[:, 0]

    def _product(self, Z: Tensor) -> Tensor:
        scale = self.scale[:, None].to(Z.dtype)
        return scale * (self.G @ (scale * Z))

    def edges(self) -> Tensor:
        return self.G.edges()

    def weights(self) -> Tensor:
        i, j = self.edges()
        return (self.scale[i] * self.scale[j]).cpu().double()

    @property
    def square_norm(self) -> Tensor:
        square = self.scale.square()
        return square @ (self.G @ square[:, None])[:, 0]


def double(x: Tensor) -> Tensor:
    """In float64, or float32 on MPS, which has no other."""
    return x.float() if x.device.type == "mps" else x.double()


def noisy(G: Relation, p: float, generator: torch.Generator) -> Edges:
    """A misspecified G of as many pairs: a share p of them, rounded to whole pairs, is replaced by pairs drawn uniformly without
    repetition among all that are not kept. At p = 1 that is a random graph, independent of G. On the host.

    Raises ValueError unless p is in [0, 1]. Pair i < j has the number j (j - 1) / 2 + i, so that no pair needs to be listed.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is not a share of the pairs: give a number from 0 to 1")
    N = G.num_rows
    i, j = G.edges().cpu()
    pairs = (j * (j - 1) // 2 + i)[i < j]
    moved = round(p * len(pairs))
    kept = pairs[torch.randperm(len(pairs), generator=generator)[moved:]].sort().values
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    drawn = torch.from_numpy(
        numbers.choice(N * (N - 1) // 2 - len(kept), moved, replace=False, shuffle=False)
    )
    skipped = torch.searchsorted(
        kept - torch.arange(len(kept)), drawn, right=True
    )  # what is drawn counts only pairs not kept
    pairs = torch.cat([kept, drawn + skipped])
    j = ((1 + (1 + 8 * pairs).double().sqrt()) / 2).long()
    return Edges(pairs - j * (j - 1) // 2, j, N)
