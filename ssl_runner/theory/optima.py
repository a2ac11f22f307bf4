"""Closed-form optima of the losses for free embeddings, in float64 (Balestriero & LeCun 2022, arXiv:2205.11508).

Each loss is a function of (Z, G), and its optimum a spectral embedding of G, the K leading eigenvectors of

    VICReg (squared)    L = D - G, orthogonal to 1, ascending    Laplacian eigenmaps
    SimCLR (squared)    G, descending                            classical multidimensional scaling (ISOMAP)
    Barlow Twins        D^-1/2 G D^-1/2, descending              canonical correlation / linear discriminant analysis

Of the eigenspaces an optimum takes the first ones whole, and from the last one as many dimensions as it likes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Relation
from ssl_runner.theory.eigenspaces import (
    TIE,
    Eigenspace,
    Groups,
    between,
    cliques,
    components,
    explicit,
    helmert,
    sparse,
    spectrum,
)

EXACT, UPPER, LOWER = "exact", "upper bound", "lower bound"
SIMPLEX_ROWS = 5000  # points up to which the simplex is written out

Selection = list[tuple[Eigenspace, int]]  # eigenspaces, and how many dimensions of each


@dataclass
class Optimum:
    """The closed form of one loss on one relation, for K columns.

    form             the method that it is
    kind             whether `value` is the exact minimum of the loss, an upper bound (it is attained by Z) or a lower bound
    value            of the loss
    singular_values  (K,) of Z, descending, zeros at the end; where there is no Z, those that the squared surrogate has
    spaces           the eigenspaces that Z's columns lie in, with the number of dimensions taken from each
    canonicalize  what the loss sees of any embedding (N, K), float64: centred or scaled, if it does not tell these apart
    make             makes Z (N, K); None where the bound has no embedding
    """

    form: str
    kind: str
    value: float
    singular_values: Tensor
    spaces: Selection
    canonicalize: Callable[[Tensor], Tensor]
    build_Z: Callable[[], Tensor] | None

    @property
    def rank(self) -> int:
        """The number of singular values above 0."""
        return int((self.singular_values > 0).sum())

    @property
    def Z(self) -> Tensor | None:
        """The embedding (N, K), float64, up to rotations of its columns and of what is tied; None where there is none."""
        return self.build_Z() if self.build_Z else None


@singledispatch
def optimum(loss: Loss, G: Relation, K: int) -> Optimum:
    """The optimum over free embeddings Z (N, K). Raises NotImplementedError for a loss without a closed form; register one with
    `@optimum.register`. Raises ValueError for K < 1, and for a G whose support rows are not free."""
    raise NotImplementedError(
        f"{type(loss).__name__} has no closed form: register one with ssl_runner.theory.optimum.register"
    )


def free_rows(G: Relation, K: int) -> int:
    """N, if a closed form is defined."""
    if K < 1:
        raise ValueError(f"K={K} is not a number of columns: give 1 or more")
    if G.num_rows < 2:
        raise ValueError("G has 1 row, and a closed form is of 2 or more")
    if G.support is not None:
        raise ValueError(
            "the closed forms are of free embeddings, and G relates some to constant rows: use a relation without queue"
        )
    return G.num_rows


def as_float64(Z: Tensor) -> Tensor:
    return Z.detach().cpu().double()


def centred(Z: Tensor) -> Tensor:
    return as_float64(Z) - as_float64(Z).mean(0)


def unit_rows(Z: Tensor) -> Tensor:
    return F.normalize(as_float64(Z))


@optimum.register
def _(loss: VICReg, G: Relation, K: int) -> Optimum:
    """Z* = sqrt(N-1) U diag(s); for the squared variance exact if beta >= alpha, where correlations cost at least what they save.
    For the hinge, and for beta < alpha, a rotation of the columns can do better."""
    N = free_rows(G, K)
    taken = take_leading(spectrum(G, "laplacian", min(K, N - 1)), min(K, N - 1))
    values = repeat_values(taken)
    s = vicreg_scales(loss, values, N)
    value = vicreg_value(loss, s, values, N) + (K - len(s)) * vicreg_value(
        loss, s.new_zeros(1), s.new_zeros(1), N
    )
    exact = loss.variance == "squared" and loss.weights["covariance"] >= loss.weights["variance"]
    return Optimum(
        form="Laplacian eigenmaps",
        kind=EXACT if exact or value <= 1e-12 * max(1, loss.weights["variance"]) * K else UPPER,
        value=value,
        singular_values=padded(math.sqrt(N - 1) * s, K),
        spaces=drop_unused(taken, s > 0),
        canonicalize=centred,
        build_Z=lambda: assemble_embedding(taken, math.sqrt(N - 1) * s, N, K),
    )


def vicreg_scales(loss: VICReg, values: Tensor, N: int) -> Tensor:
    """Eigenvalues (k,) of the Laplacian -> standard deviations s (k,) of the decorrelated columns that minimise VICReg: with
    c = gamma (N-1) lambda / (N alpha), s^2 = max(0, 1 - c) if squared, and s^2 = max(0, min(1, 1/4c)^2 - eps) for the hinge."""
    alpha, gamma = loss.weights["variance"], loss.weights["invariance"]
    if alpha == 0:
        return torch.zeros_like(values)
    cost = gamma * (N - 1) / (N * alpha) * values.clamp(min=0)
    s2 = 1 - cost if loss.variance == "squared" else (0.25 / cost).clamp(max=1).square() - loss.eps
    return torch.where(s2 > TIE, s2, 0.0).sqrt()


def vicreg_value(loss: VICReg, s: Tensor, values: Tensor, N: int) -> float:
    """VICReg of decorrelated columns with standard deviations s (k,) along eigenvectors of the Laplacian's eigenvalues (k,)."""
    variance = (
        (1 - s.square()).square()
        if loss.variance == "squared"
        else (1 - (s.square() + loss.eps).sqrt()).relu()
    )
    invariance = 2 * (N - 1) / N * values * s.square()
    return float((loss.weights["variance"] * variance + loss.weights["invariance"] * invariance).sum())


@optimum.register
def _(loss: SpectralContrastive, G: Relation, K: int) -> Optimum:
    """Z* = [w_k sqrt(max(t g_k, 0))]: of G's positive eigenvalues only, so the rank is at most their number."""
    N = free_rows(G, K)
    t = loss.target_scale(N, G.degrees.cpu().double().sum())
    dims = min(K, N - 1 if loss.center else N)
    taken = take_leading(spectrum(G, "adjacency", dims, loss.center), dims)
    g = t * repeat_values(taken)
    g = torch.where(g > TIE * g.abs().max() if len(g) else g > 0, g, 0.0)
    return Optimum(
        form="multidimensional scaling",
        kind=EXACT,
        value=square_norm(G) - float(g.square().sum())
        if loss.reduction == "sum"
        else -float(g.square().sum()) / N**2,
        singular_values=padded(g.sqrt(), K),
        spaces=drop_unused(taken, g > 0),
        canonicalize=centred if loss.center else as_float64,
        build_Z=lambda: assemble_embedding(taken, g.sqrt(), N, K),
    )


def square_norm(G: Relation) -> float:
    """sum_ij G_ij^2."""
    groups = cliques(G)
    return float(
        (groups.sizes * groups.degrees * groups.weights).sum() if groups else G.weights().square().sum()
    )


@optimum.register
def _(loss: SimCLR, G: Relation, K: int) -> Optimum:
    """Where G joins M groups of one size m, a regular simplex of M points: exact if K >= M - 1, else a lower bound. For any other
    G the lower bound that each row's softmax can at best be G's own row. Where a lower bound has no embedding, rank and
    eigenspaces are those of the squared surrogate, whose singular values are scaled to rows of norm 1."""
    N = free_rows(G, K)
    total = float(G.degrees.cpu().double().sum())
    groups = cliques(G)
    if groups is None or len(groups.sizes.unique()) > 1 or total == 0:
        surrogate = optimum(SpectralContrastive(), G, K)
        value = row_entropy(G, groups) / (total if loss.reduction == "mean" and total else 1)
        scale = math.sqrt(N) / max(float(surrogate.singular_values.norm()), 1e-300)
        return Optimum(
            "row entropy",
            LOWER if total else EXACT,
            value,
            scale * surrogate.singular_values,
            surrogate.spaces,
            unit_rows,
            None,
        )
    M, m = len(groups.sizes), int(groups.sizes[0])
    others = (N - m) * math.exp(-(1 + 1 / (M - 1)) / loss.tau) if M > 1 else 0.0
    one = torch.ones(N, dtype=torch.float64)
    between_groups = between(1.0, groups.y, one, groups.sizes > 0, one if M > 1 else None)
    dims = min(K, max(M - 1, 1))

    def make() -> Tensor:
        if M > SIMPLEX_ROWS:
            raise ValueError(f"a simplex of {M} points is too large to write out")
        if M == 1:
            return F.pad(torch.ones(N, 1, dtype=torch.float64), (0, K - 1))
        vertices = helmert(torch.ones(M, dtype=torch.float64), M - 1) * math.sqrt(M / (M - 1))
        return F.pad(vertices[groups.y], (0, K - vertices.shape[1]))

    return Optimum(
        form="simplex",
        kind=EXACT if K >= M - 1 else LOWER,
        value=math.log(m - 1 + others) * (1 if loss.reduction == "mean" else total),
        singular_values=padded(torch.full((dims,), math.sqrt(N / dims), dtype=torch.float64), K),
        spaces=[(between_groups, dims)],
        canonicalize=(lambda Z: centred(unit_rows(Z))) if M > 1 else unit_rows,
        build_Z=make if K >= M - 1 else None,
    )


def row_entropy(G: Relation, groups: Groups | None) -> float:
    """-sum_ij G_ij log(G_ij / d_i), a lower bound of SimCLR's sum; sum_i d_i log d_i where entries are 0 or 1.
    groups: those of G, if it has any."""
    if groups:
        return float(
            torch.special.xlogy(groups.sizes * groups.degrees, (groups.sizes - 1).double().clamp(min=1)).sum()
        )
    d, weights = G.degrees.cpu().double(), G.weights()
    return float(torch.special.xlogy(d, d).sum() - torch.special.xlogy(weights, weights).sum())


@optimum.register
def _(loss: BarlowTwins, G: Relation, K: int) -> Optimum:
    """Z* = D^-1/2 [w_1 ... w_K], which maximises Tr(Z'GZ) under Z'DZ = I: C = diag(rho), value sum_k (1 - rho_k)^2. Where there
    are less than K rho > 0, a column too many is 0 and costs 1, or, if that is cheaper, all columns share the dimensions of
    rho > 0 or those of rho = 1 as a tight frame F: C = F' diag(rho) F. The loss can go lower still, unless the value is 0."""
    N = free_rows(G, K)
    d = G.degrees.cpu().double()
    dims = min(K, int((d > 0).sum()) - (1 if loss.center else 0))
    taken = [
        (space, q)
        for space, q in take_leading(spectrum(G, "normalized", dims, loss.center), dims)
        if space.value > TIE
    ]
    unit = 1 / (1 + loss.eps)  # C_kk of a column with z'Gz = z'Dz = 1
    rho = repeat_values(taken)
    mixes = [torch.eye(len(rho), K, dtype=torch.float64)]
    ones = int((rho > 1 - TIE).sum())
    if len(rho) < K:
        mixes += [tight_frame(r, K) for r in {len(rho), ones} - {0}]
    values = [float(loss.total(loss.of_correlations(unit * M.T @ (rho[: len(M), None] * M)))) for M in mixes]
    value, mix = min(zip(values, mixes, strict=True), key=lambda pair: pair[0])
    taken = take_leading([space for space, _ in taken], len(mix))
    scale = torch.where(d > 0, d.clamp(min=1e-300).rsqrt(), 0)[:, None]

    def make() -> Tensor:
        return scale * assemble_embedding(taken, torch.ones(len(mix), dtype=torch.float64), N, len(mix)) @ mix

    def seen(Z: Tensor) -> Tensor:
        Z = as_float64(Z)
        if loss.center:
            Z = Z - d @ Z / d.sum().clamp(min=1e-300)
        Z = Z * (d > 0)[:, None]
        return Z / (d @ Z.square()).sqrt().clamp(min=1e-300)

    regular = bool((d == d[0]).all())
    squares = mix @ mix.T / d[0].clamp(min=1e-300) if regular else (Z := make()).T @ Z
    return Optimum(
        form="canonical correlation analysis",
        kind=EXACT if len(rho) == K and ones == K else UPPER,
        value=value,
        singular_values=padded(gram_singular_values(squares), K),
        spaces=taken
        if regular
        else map_eigenspaces(taken, scale, components(sparse(G)), d if loss.center else None),
        canonicalize=seen,
        build_Z=make,
    )


def tight_frame(r: int, K: int) -> Tensor:
    """K unit vectors in r < K dimensions, FF' = K/r I: (r, K), rows of the Hartley transform, cos + sin of frequencies +-j."""
    frequencies = torch.tensor([j for j in range(-(r // 2), r // 2 + 1) if j or r % 2])
    angles = 2 * math.pi * torch.outer(frequencies, torch.arange(K)).double() / K
    return (angles.cos() + angles.sin()) / r**0.5


def map_eigenspaces(taken: Selection, scale: Tensor, y: Tensor, orthogonal: Tensor | None) -> Selection:
    """What D^-1/2, as scales (N, 1), makes of eigenspaces of the normalised matrix: orthogonal again, each orthogonal to those
    before. That of the eigenvalue 1 becomes the vectors that are constant on each component y (N,)."""
    done: Selection = []
    for space, q in taken:
        if space.value > 1 - TIE:
            done.append((between(1.0, y, torch.ones_like(scale[:, 0]), torch.bincount(y) > 1, orthogonal), q))
            continue
        vectors = scale * space.basis(space.dim)
        for before, _ in done:
            vectors = vectors - before.project(vectors)
        done.append((explicit(space.value, torch.linalg.qr(vectors)[0].numpy()), q))
    return done


def gram_singular_values(squares: Tensor) -> Tensor:
    """Z'Z or ZZ' -> the singular values of Z that are not 0 up to roundings, descending."""
    values = torch.linalg.eigvalsh(squares).clamp(min=0).flip(0)
    return values[values > 1e-12 * values[:1]].sqrt()


# Dimensions taken


def take_leading(spaces: list[Eigenspace], k: int) -> Selection:
    """The first spaces, with how many dimensions of each make up k."""
    taken = []
    for space in spaces:
        if k <= 0:
            break
        taken.append((space, min(space.dim, k)))
        k -= space.dim
    return taken


def repeat_values(taken: Selection) -> Tensor:
    """The eigenvalue of each dimension taken: (k,) float64."""
    return torch.tensor([space.value for space, q in taken for _ in range(q)], dtype=torch.float64)


def drop_unused(taken: Selection, used: Tensor) -> Selection:
    """The spaces of which dimensions are used, used (k,) boolean the same throughout a space."""
    starts = np.cumsum([0, *(q for _, q in taken)])
    return [pair for pair, start in zip(taken, starts, strict=False) if used[start]]


def assemble_embedding(taken: Selection, scales: Tensor, N: int, K: int) -> Tensor:
    """The basis vectors of the dimensions taken, times scales (k,), and columns of zeros: (N, K)."""
    vectors = [space.basis(q) for space, q in taken] or [torch.zeros(N, 0, dtype=torch.float64)]
    return padded(torch.cat(vectors, 1) * scales, K)


def padded(values: Tensor, K: int) -> Tensor:
    """Zeros at the end of the last dimension, up to K."""
    return F.pad(values, (0, K - values.shape[-1]))
