"""Relations derived from another one: extended to views, with a support set, normalised, or rewired."""

import numpy as np
import torch
from torch import Tensor

from ssl_runner.relation.operators import Edges, Relation, Views, to_float64


class ViewExpanded(Relation):
    """A relation A (n, n) over images, extended to V views of each: G = (11' - I)_V (x) I_n + 11'_V (x) A.

    Rows are view-major. Rows i != j are positives iff they are views of the same image or of two images that
    are a positive pair in A.
    """

    V: int

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


class WithSupportSet(Relation):
    """Views of n images, and k support rows per image as further positives (NNCLR, Dwibedi et al. 2021).

    support (n k, K): constant embeddings, for NNCLR the nearest neighbours in a queue. They are the last n k
    rows of Z: row V n + i k + a is support row a of image i, a positive of every view of image i.
    """

    def __init__(self, n: int, V: int, support: Tensor):
        self.views, self.n, self.support = Views(n, V, device=support.device), n, support
        self.num_rows, self.k = n * V + len(support), len(support) // n
        self.degrees = torch.cat([self.views.degrees + self.k, self.views.degrees.new_full((n * self.k,), V)])

    def _product(self, Z: Tensor) -> Tensor:
        Z, support = Z[: self.views.num_rows], Z[self.views.num_rows :]
        sums = Z.reshape(self.views.V, self.n, -1).sum(0)
        support_sums = support.reshape(self.n, self.k, -1).sum(1).repeat(self.views.V, 1)
        return torch.cat([self.views @ Z + support_sums, sums.repeat_interleave(self.k, 0)])

    def edges(self) -> Tensor:
        rows = torch.arange(self.views.num_rows, device=self.degrees.device)
        support = (
            self.views.num_rows + (rows % self.n * self.k)[:, None] + torch.arange(self.k, device=rows.device)
        )
        i, j = torch.cat(
            [self.views.edges(), torch.stack([rows.repeat_interleave(self.k), support.flatten()])], 1
        )
        return Edges(i, j, self.num_rows).edges()


class DegreeNormalized(Relation):
    """D^-1/2 G D^-1/2 of a relation G. Rows without positives stay zero."""

    def __init__(self, G: Relation):
        self.G, self.num_rows, self.support = G, G.num_rows, G.support
        self.V, self.num_groups = G.V, G.num_groups
        degrees = to_float64(G.degrees)
        # a product, because torch.where with the scalar 0 causes a host-device sync on CUDA
        self.scale = (degrees > 0) * degrees.clamp(min=1).rsqrt()
        self.degrees = self._product(torch.ones_like(self.scale)[:, None])[:, 0]

    def _product(self, Z: Tensor) -> Tensor:
        scale = self.scale[:, None].to(Z.dtype)
        return scale * (self.G @ (scale * Z))

    @property
    def groups(self) -> Tensor | None:
        return self.G.groups if type(self) is DegreeNormalized else None

    def edges(self) -> Tensor:
        return self.G.edges()

    def weights(self) -> Tensor:
        i, j = self.edges()
        return (self.scale[i] * self.scale[j]).cpu().double() * self.G.weights()

    @property
    def square_norm(self) -> Tensor:
        if self.G.weighted:
            return self.weights().square().sum()
        square = self.scale.square()
        return square @ (self.G @ square[:, None])[:, 0]


def rewire(G: Relation, p: float, generator: torch.Generator) -> Edges:
    """Rewire a fraction p of the pairs of G at random, to get a misspecified G with the same number of pairs.

    The number of rewired pairs is p times the number of pairs, rounded. The new pairs are drawn uniformly
    without replacement from all pairs that are not kept. At p = 1 the result is a random graph, independent
    of G. Runs on the CPU. Raises ValueError unless 0 <= p <= 1.

    Pair i < j has the number j (j - 1) / 2 + i, so that drawing needs no list of all pairs.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}: expected a number from 0 to 1; give the fraction of pairs to rewire")
    N = G.num_rows
    i, j = G.edges().cpu()
    pairs = (j * (j - 1) // 2 + i)[i < j]
    num_new = round(p * len(pairs))
    kept = pairs[torch.randperm(len(pairs), generator=generator, device="cpu")[num_new:]].sort().values
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device="cpu")))
    candidates = N * (N - 1) // 2 - len(kept)
    drawn = torch.from_numpy(rng.choice(candidates, num_new, replace=False, shuffle=False))
    # `drawn` indexes the pairs that are not kept: add the number of kept pairs before each of them
    skipped = torch.searchsorted(kept - torch.arange(len(kept), device="cpu"), drawn, right=True)
    pairs = torch.cat([kept, drawn + skipped])
    return Edges(*pair_of_number(pairs), N)


def pair_of_number(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """i and j (E,) of the pairs i < j with numbers j (j - 1) / 2 + i (E,), exact below `MAX_ROWS` rows."""
    j = ((1 + (1 + 8 * numbers.double()).sqrt()) / 2).long()  # may be off by one above 1e8 rows
    j -= (j * (j - 1) // 2 > numbers).long()
    j += (j * (j + 1) // 2 <= numbers).long()
    return numbers - j * (j - 1) // 2, j
