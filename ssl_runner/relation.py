"""The relation G between the N rows of X, as an operator: a loss needs `G @ Z` and the degrees, never an N x N matrix."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor


class Relation(ABC):
    """G (N, N): symmetric, zero diagonal, G_ij > 0 iff rows i and j are positives of each other.

    `degrees` (N,) float32 holds d_i = sum_j G_ij. A *normalized* relation divides row i by its degree, so that each row that
    has a positive sums to 1 and sum_ij G_ij no longer grows with the number of views.
    """

    needs_labels: ClassVar[bool] = False
    num_rows: int
    degrees: Tensor

    def __matmul__(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K), differentiable in Z. Raises ValueError when Z has another number of rows."""
        if Z.ndim != 2 or len(Z) != self.num_rows:
            raise ValueError(f"G relates {self.num_rows} rows and needs Z of shape ({self.num_rows}, K), not {tuple(Z.shape)}")
        return self._product(Z)

    @abstractmethod
    def _product(self, Z: Tensor) -> Tensor:
        """Z (N, K) -> G @ Z (N, K)."""

    @abstractmethod
    def edges(self) -> Tensor:
        """The ordered pairs (i, j) with G_ij > 0, in both directions, sorted: (2, E) int64."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """G as an (N, N) matrix, for theory, tests and pictures; a training step never needs it."""
        return self @ torch.eye(self.num_rows, dtype=dtype or torch.get_default_dtype(), device=self.degrees.device)


class Views(Relation):
    """Rows i != j are positives iff they are views of one original: G = (11' - I)_V (x) I_n, rows view-major.

    n originals, V >= 2 views each, N = V n; row v n + k is view v of original k. `G @ Z` costs O(N K) whatever V is.
    """

    def __init__(self, n: int, V: int, normalized: bool = False, device: torch.device | str | None = None):
        if n < 1 or V < 2:
            raise ValueError(f"Views needs n >= 1 originals and V >= 2 views, not n={n}, V={V}")
        self.n, self.V, self.num_rows = n, V, n * V
        self.weight = 1 / (V - 1) if normalized else 1.0
        self.degrees = torch.full((self.num_rows,), 1.0 if normalized else V - 1.0, dtype=torch.float32, device=device)

    @classmethod
    def of_batch(cls, labels: Tensor, V: int, num_classes: int, normalized: bool = False) -> Self:
        """The relation of V views of a batch whose originals have `labels` (n,), of which only n and the device are used."""
        return cls(len(labels), V, normalized, labels.device)

    def _product(self, Z: Tensor) -> Tensor:
        views = Z.reshape(self.V, self.n, -1)
        return self.weight * (views.sum(0) - views).reshape(self.num_rows, -1)

    def edges(self) -> Tensor:
        rows = torch.arange(self.num_rows, device=self.degrees.device)
        shifts = torch.arange(1, self.V, device=rows.device) * self.n
        others = ((rows[:, None] + shifts) % self.num_rows).sort(dim=1).values
        return torch.stack([rows.repeat_interleave(self.V - 1), others.flatten()])


class Labels(Relation):
    """Rows i != j are positives iff they have the same label (supervised SSL). y (N,) integers >= 0.

    `G @ Z` is the class sum minus the row itself: O(N K); CUDA takes the sums in any order, so its last bits vary there. Where
    `num_classes` is known, giving it saves a host-device sync.
    """

    needs_labels = True

    def __init__(self, y: Tensor, num_classes: int | None = None, normalized: bool = False):
        if y.ndim != 1 or y.is_floating_point() or y.numel() == 0:
            raise ValueError(f"Labels needs a non-empty vector of integers, not shape {tuple(y.shape)} of {y.dtype}")
        if num_classes is None:
            if y.min() < 0:
                raise ValueError(f"Labels needs labels >= 0, and the smallest is {y.min()}: leave out rows without a label")
            num_classes = int(y.max()) + 1
        self.y, self.num_rows, self.num_classes, self.normalized = y.long(), len(y), num_classes, normalized
        ones = torch.ones(self.num_rows, dtype=torch.float32, device=y.device)
        self.positives = torch.zeros(num_classes, device=y.device).index_add_(0, self.y, ones)[self.y] - 1
        self.degrees = self.positives.clamp(max=1) if normalized else self.positives

    @classmethod
    def of_batch(cls, labels: Tensor, V: int, num_classes: int, normalized: bool = False) -> Self:
        """The relation of V views of a batch whose originals have `labels` (n,)."""
        return cls(labels.repeat(V), num_classes, normalized)

    def _product(self, Z: Tensor) -> Tensor:
        sums = Z.new_zeros(self.num_classes, Z.shape[1]).index_add(0, self.y, Z)
        GZ = sums[self.y] - Z
        return GZ / self.positives.clamp(min=1)[:, None].to(Z.dtype) if self.normalized else GZ

    def edges(self) -> Tensor:
        same = self.y[:, None] == self.y
        return same.fill_diagonal_(False).nonzero().T


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
            raise ValueError(f"Edges needs two vectors of one length, not shapes {tuple(i.shape)} and {tuple(j.shape)}")
        if len(i):
            low, high = min(i.min(), j.min()), max(i.max(), j.max())
            if low < 0 or high >= num_rows:
                raise ValueError(f"Edges of {num_rows} rows needs indices from 0 to {num_rows - 1}, not {low} to {high}")
        if (i == j).any():
            raise ValueError(f"Edges: row {i[i == j][0]} is paired with itself; a row is never its own positive")
        self.num_rows = num_rows
        codes = torch.unique(torch.cat([i * num_rows + j, j * num_rows + i]))
        self.pairs = torch.stack([codes // num_rows, codes % num_rows])
        self.degrees = torch.bincount(self.pairs[0], minlength=num_rows).to(torch.float32)

    def _product(self, Z: Tensor) -> Tensor:
        ones = Z.new_ones(self.pairs.shape[1])
        shape = (self.num_rows, self.num_rows)
        G = torch.sparse_coo_tensor(self.pairs.to(Z.device), ones, shape, is_coalesced=True, check_invariants=False)
        return torch.sparse.mm(G, Z)

    def edges(self) -> Tensor:
        return self.pairs
