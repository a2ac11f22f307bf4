"""The relation G over the N rows of X, as a linear operator: no training step builds an N x N matrix."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ssl_runner.device import to_device
from ssl_runner.distributed import all_gather_object, all_reduce_sharded, all_reduce_sum, rank, world_size

MAX_ROWS = math.isqrt(2**63 - 1)  # of Edges: the number i * num_rows + j of a pair fits into int64


class Relation(ABC):
    """Graph of positive pairs: G (N, N), symmetric, zero diagonal, G_ij > 0 iff (i, j) is a positive pair.

    `degrees` (N,) holds d_i = sum_j G_ij. A *normalized* relation divides G_ij by sqrt(d_i d_j), so that
    sum_ij G_ij does not grow with the number of views or positives. If positives have equal degrees, each
    nonzero row sums to 1.
    """

    num_rows: int
    degrees: Tensor
    V: int | None = None  # if rows are V equal blocks, view-major: row v n + k is view v of image k
    num_groups: int | None = None  # number of groups over all ranks, see `groups`
    weighted: bool = False  # entries are not only 0 and 1
    support: Tensor | None = None  # (m, K) constant embeddings appended to Z (NNCLR support set), or None

    def __matmul__(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K), differentiable in Z. Raises ValueError unless Z has shape (N, K)."""
        if Z.ndim != 2 or len(Z) != self.num_rows:
            raise ValueError(
                f"Z.shape={tuple(Z.shape)}: expected ({self.num_rows}, K); give one embedding per row of G"
            )
        return self._product(Z)

    @abstractmethod
    def _product(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K)."""

    @property
    def groups(self) -> Tensor | None:
        """Group of each row, (N,) int64 below `num_groups`, if rows are positives iff their groups are equal.

        None for any other relation, and for subclasses, which may override the product. A group has the same
        number on all ranks, and its rows may lie on several: a sharded loss all-reduces its sums over groups,
        of shape (num_groups, ...). Groups without rows are possible.
        """
        return None

    @abstractmethod
    def edges(self) -> Tensor:
        """Ordered pairs (i, j) with G_ij > 0, both directions, sorted: (2, E) int64."""

    def weights(self) -> Tensor:
        """G_ij of the pairs in `edges`: (E,) float64, on the CPU."""
        return torch.ones(self.edges().shape[1], dtype=torch.float64, device="cpu")

    @property
    def square_norm(self) -> Tensor:
        """sum_ij G_ij^2, a scalar tensor."""
        return to_float64(self.degrees).sum()  # if entries are 0 or 1

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """G as an (N, N) matrix, for theory, tests and plots. Training does not use it."""
        return self @ torch.eye(
            self.num_rows, dtype=dtype or torch.get_default_dtype(), device=self.degrees.device
        )


class Views(Relation):
    """Rows i != j are positives iff they are views of one image: G = (11' - I)_V (x) I_n, rows view-major.

    n images with V >= 2 views each, N = V n; row v n + k is view v of image k. `G @ Z` takes O(N K),
    independent of V. Raises ValueError for n < 1 or V < 2.
    """

    V: int

    def __init__(self, n: int, V: int, normalized: bool = False, device: torch.device | str | None = None):
        if n < 1 or V < 2:
            raise ValueError(
                f"n={n}, V={V}: expected n >= 1 and V >= 2; give at least two views of at least one image"
            )
        self.n, self.V, self.num_rows, self.num_groups = n, V, n * V, n * world_size()
        self.weight = 1 / (V - 1) if normalized else 1.0
        self.degrees = torch.full(
            (self.num_rows,), 1.0 if normalized else V - 1.0, dtype=torch.float32, device=device
        )

    def _product(self, Z: Tensor) -> Tensor:
        views = Z.reshape(self.V, self.n, -1)
        GZ = (views.flip(0) if self.V == 2 else views.sum(0) - views).reshape(self.num_rows, -1)
        return GZ if self.weight == 1 else self.weight * GZ

    @property
    def groups(self) -> Tensor | None:
        rows = torch.arange(self.num_rows, device=self.degrees.device)
        return rows % self.n + rank() * self.n if type(self) is Views else None

    def edges(self) -> Tensor:
        rows = torch.arange(self.num_rows, device=self.degrees.device)
        shifts = torch.arange(1, self.V, device=rows.device) * self.n
        others = ((rows[:, None] + shifts) % self.num_rows).sort(dim=1).values
        return torch.stack([rows.repeat_interleave(self.V - 1), others.flatten()])

    def weights(self) -> Tensor:
        return torch.full((self.num_rows * (self.V - 1),), self.weight, dtype=torch.float64, device="cpu")

    @property
    def square_norm(self) -> Tensor:
        return self.weight * to_float64(self.degrees).sum()


class Labels(Relation):
    """Rows i != j are positives iff they have the same label (supervised SSL). y (N,) integers >= 0.

    `G @ Z` is the class sum minus the row itself, in O(N K). On CUDA the order of summation is not
    deterministic, so the last bits may vary. Passing `num_classes` avoids a host-device sync, and on devices
    other than the CPU also the check that all labels are below it: check them once, where they are loaded.

    In distributed training y holds the labels of this rank's rows, and their positives may lie on any rank.
    The class sums are all-reduced; `edges` and `dense` cover the rows of this rank only.

    Raises ValueError if y is empty or not a vector of integers, or if a label is negative or, on the CPU, not
    below `num_classes`.
    """

    def __init__(self, y: Tensor, num_classes: int | None = None, normalized: bool = False):
        if y.ndim != 1 or y.is_floating_point() or y.numel() == 0:
            raise ValueError(
                f"y of shape {tuple(y.shape)} and {y.dtype}: expected a non-empty vector of integers;"
                " give one label per row"
            )
        if num_classes is None:
            if y.min() < 0:
                raise ValueError(
                    f"y.min()={y.min()}: expected labels >= 0; leave out the rows that have no label"
                )
            num_classes = max(all_gather_object(int(y.max()) + 1))
        elif y.device.type == "cpu" and (y.min() < 0 or y.max() >= num_classes):
            raise ValueError(
                f"labels from {y.min()} to {y.max()}: expected 0 to num_classes - 1 = {num_classes - 1};"
                " leave out the rows that have no label"
            )
        self.y, self.num_rows, self.num_classes, self.normalized = y.long(), len(y), num_classes, normalized
        self.num_groups = num_classes
        ones = torch.ones(self.num_rows, dtype=torch.float32, device=y.device)
        sizes = all_reduce_sum(ones.new_zeros(num_classes).index_add_(0, self.y, ones))
        self.positives = sizes[self.y] - 1
        self.degrees = self.positives.clamp(max=1) if normalized else self.positives

    def _product(self, Z: Tensor) -> Tensor:
        sums = all_reduce_sharded(Z.new_zeros(self.num_classes, Z.shape[1]).index_add(0, self.y, Z))
        GZ = sums[self.y] - Z
        return GZ / self.positives.clamp(min=1)[:, None].to(Z.dtype) if self.normalized else GZ

    @property
    def groups(self) -> Tensor | None:
        return self.y if type(self) is Labels else None

    def edges(self) -> Tensor:
        same = self.y[:, None] == self.y
        return same.fill_diagonal_(False).nonzero().T

    def weights(self) -> Tensor:
        positives = self.positives[self.edges()[0]].cpu().double()
        return 1 / positives if self.normalized else torch.ones_like(positives)

    @property
    def square_norm(self) -> Tensor:
        degrees = to_float64(self.degrees)
        return (degrees / self.positives.clamp(min=1)).sum() if self.normalized else degrees.sum()


class Edges(Relation):
    """Arbitrary relation given by a list of pairs: i, j (E,) integers in 0 .. num_rows - 1.

    A pair may be listed in one or both directions; it is symmetrised, and repeats are ignored. `G @ Z` is a
    sparse product in O(E K). Raises ValueError for i and j of different shapes, non-integers, indices out of
    range, i = j, and more than MAX_ROWS rows.
    """

    def __init__(self, i: Tensor, j: Tensor, num_rows: int):
        if num_rows > MAX_ROWS:
            raise ValueError(
                f"num_rows={num_rows}: expected at most {MAX_ROWS}, so that pairs can be numbered in int64;"
                " use a subset of the rows"
            )
        i, j = (side if isinstance(side, Tensor) else torch.as_tensor(side, device="cpu") for side in (i, j))
        if len(i) and (i.is_floating_point() or j.is_floating_point()):
            raise ValueError(f"i, j of {i.dtype} and {j.dtype}: expected integers; give row indices")
        i, j = i.long(), j.long()
        if i.shape != j.shape or i.ndim != 1:
            raise ValueError(
                f"i, j of shapes {tuple(i.shape)} and {tuple(j.shape)}: expected two vectors of equal length;"
                " give one entry per pair in each"
            )
        if len(i):
            low, high = min(i.min(), j.min()), max(i.max(), j.max())
            if low < 0 or high >= num_rows:
                raise ValueError(
                    f"i, j from {low} to {high}: expected indices from 0 to {num_rows - 1};"
                    " number the rows from 0 and leave out pairs of other rows"
                )
        if (i == j).any():
            raise ValueError(
                f"i=j={i[i == j][0]}: expected pairs of different rows; leave out pairs of a row with itself"
            )
        self.num_rows = num_rows
        codes = torch.unique(torch.cat([i * num_rows + j, j * num_rows + i]))
        self.pairs = torch.stack([codes // num_rows, codes % num_rows])
        self.degrees = torch.bincount(self.pairs[0], minlength=num_rows).to(torch.float32)

    def _product(self, Z: Tensor) -> Tensor:
        return _SymmetricProduct.apply(self.pairs.to(Z.device), Z)

    def edges(self) -> Tensor:
        return self.pairs

    def to(self, device: torch.device) -> "Edges":
        """Move this relation to `device`, in place and without a host-device sync."""
        self.pairs, self.degrees = to_device(self.pairs, device), to_device(self.degrees, device)
        return self


class _SymmetricProduct(torch.autograd.Function):
    """G @ Z for a constant symmetric G of ones at `pairs` (2, E), sorted and without repeats.

    The backward of torch.sparse.mm multiplies by G', which it sorts first; on CUDA that is a host-device
    sync. Since G' = G, this backward uses G itself.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, Z: Tensor) -> Tensor:
        ctx.pairs = pairs
        return _row_sums(pairs, Z) if torch.are_deterministic_algorithms_enabled() else _sparse(pairs, Z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _SymmetricProduct.apply(ctx.pairs, gradient)


def _sparse(pairs: Tensor, Z: Tensor) -> Tensor:
    """G @ Z as a product with a sparse matrix. cuSPARSE may sum in another order in every call."""
    # In torch 2.11 `check_invariants=False` warns outside of this context.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        # a CPU is named for the case that torch's default device is another one; other devices follow from Z
        G = torch.sparse_coo_tensor(
            pairs,
            Z.new_ones(pairs.shape[1]),
            (len(Z), len(Z)),
            device="cpu" if Z.device.type == "cpu" else None,
            is_coalesced=True,
            check_invariants=False,
        )
        return torch.sparse.mm(G, Z)


def _row_sums(pairs: Tensor, Z: Tensor) -> Tensor:
    """G @ Z as sums of rows, for which torch has deterministic kernels. Holds (E, K) values in memory."""
    i, j = pairs
    return torch.zeros_like(Z).index_add(0, i, Z[j])


class KNearest(Relation):
    """Rows are positives iff at least one of them is among the k nearest neighbours of the other.

    neighbors (n, k): the indices of the k nearest rows of each row i, distinct. An entry i in row i is no
    pair. `G @ Z` takes O(n k K) and needs no host-device sync, which symmetrising a sparse matrix would.
    """

    def __init__(self, neighbors: Tensor):
        self.num_rows, self.k = neighbors.shape
        self.neighbors = neighbors
        own = torch.arange(self.num_rows, device=neighbors.device)[:, None, None]
        self.loops = (neighbors[..., None] == own).sum(1).to(torch.float32)  # (n, 1): 1 where row i lists i
        # (n, k): 0 where the neighbour lists row i as well, so that a mutual pair counts once
        self.one_sided = 1 - (neighbors[neighbors] == own).any(2).to(torch.float32)
        self.degrees = self._product(self.one_sided.new_ones(self.num_rows, 1))[:, 0]

    def _product(self, Z: Tensor) -> Tensor:
        one_sided = self.one_sided[..., None].to(Z.dtype)
        forward = Z[self.neighbors].sum(1) - self.loops.to(Z.dtype) * Z
        reverse = (one_sided * Z[:, None]).flatten(0, 1)
        return forward + torch.zeros_like(Z).index_add(0, self.neighbors.flatten(), reverse)

    def edges(self) -> Tensor:
        own = torch.arange(self.num_rows, device=self.neighbors.device).repeat_interleave(self.k)
        others = self.neighbors.flatten()
        return Edges(own[own != others], others[own != others], self.num_rows).edges()


def to_float64(x: Tensor) -> Tensor:
    """Convert x to float64, or to float32 on MPS, which does not support float64."""
    return x.float() if x.device.type == "mps" else x.double()
