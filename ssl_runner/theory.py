"""Closed-form optima of the losses for free embeddings, in float64 (Balestriero & LeCun 2022, arXiv:2205.11508).

Each loss is a function of (Z, G), and its optimum a spectral embedding of G, the K leading eigenvectors of

    VICReg (squared)    L = D - G, orthogonal to 1, ascending    Laplacian eigenmaps
    SimCLR (squared)    G, descending                            classical multidimensional scaling (ISOMAP)
    Barlow Twins        D^-1/2 G D^-1/2, descending              canonical correlation / linear discriminant analysis

The matrices have eigenvalues of high multiplicity: where G relates views, any K of its n leading eigenvectors will do. So a
spectrum is a list of eigenspaces, of which an optimum takes the first ones whole and from the last one as many as it likes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.relation import Labels, Normalized, Relation, Views

EXACT, UPPER, LOWER = "exact", "upper bound", "lower bound"
DENSE = 2000  # rows up to which a relation without structure is decomposed whole, not iteratively
TIE = 1e-9  # eigenvalues this near to each other, relative to the largest, are one eigenspace
SIMPLEX_ROWS = 5000  # points up to which the simplex is written out


@dataclass
class Eigenspace:
    """All vectors of one eigenvalue: their dimension, the first q of an orthonormal basis (N, q), the projector onto them."""

    value: float
    dim: int
    basis: Callable[[int], Tensor]
    project: Callable[[Tensor], Tensor]


@dataclass
class Optimum:
    """The closed form of one loss on one relation, for K columns.

    form             the method that it is
    kind             whether `value` is the exact minimum of the loss, an upper bound (it is attained by Z) or a lower bound
    value            of the loss
    singular_values  (K,) of Z, descending, zeros at the end; with a lower bound, those of the squared surrogate
    spaces           the eigenspaces that Z's columns lie in, with the number of dimensions taken from each
    centred          whether Z's columns are orthogonal to 1
    make             makes Z (N, K); None where the bound has no embedding
    """

    form: str
    kind: str
    value: float
    singular_values: Tensor
    spaces: list[tuple[Eigenspace, int]]
    centred: bool
    make: Callable[[], Tensor] | None

    @property
    def rank(self) -> int:
        """The number of singular values above 0."""
        return int((self.singular_values > 0).sum())

    @property
    def Z(self) -> Tensor | None:
        """The embedding (N, K), float64, up to rotations of its columns and of what is tied; None where there is none."""
        return self.make() if self.make else None


@singledispatch
def optimum(loss: Loss, G: Relation, K: int) -> Optimum:
    """The optimum over free embeddings Z (N, K). Raises NotImplementedError for a loss without a closed form; register one with
    `@optimum.register`."""
    raise NotImplementedError(f"{type(loss).__name__} has no closed form: register one with ssl_runner.theory.optimum.register")


@optimum.register
def _(loss: VICReg, G: Relation, K: int) -> Optimum:
    """Z* = sqrt(N-1) U diag(s); for the squared variance exact if beta >= alpha, where correlations cost at least what they save.
    For the hinge, and for beta < alpha, a rotation of the columns can do better."""
    N = G.num_rows
    taken = leading(spectrum(G, "laplacian", min(K, N - 1), center=True), min(K, N - 1))
    values = repeat_values(taken)
    s = vicreg_scales(loss, values, N)
    value = vicreg_value(loss, s, values, N) + (K - len(s)) * vicreg_value(loss, s.new_zeros(1), s.new_zeros(1), N)
    exact = loss.variance == "squared" and loss.weights["covariance"] >= loss.weights["variance"]
    return Optimum(
        form="Laplacian eigenmaps",
        kind=EXACT if exact or value <= 1e-12 * max(1, loss.weights["variance"]) * K else UPPER,
        value=value,
        singular_values=padded(math.sqrt(N - 1) * s, K),
        spaces=keep(taken, s > 0),
        centred=True,
        make=lambda: embed(taken, math.sqrt(N - 1) * s, K),
    )


def vicreg_scales(loss: VICReg, values: Tensor, N: int) -> Tensor:
    """Eigenvalues (k,) of the Laplacian -> standard deviations s (k,) of the decorrelated columns that minimise VICReg."""
    alpha, gamma = loss.weights["variance"], loss.weights["invariance"]
    if alpha == 0:
        return torch.zeros_like(values)
    cost = gamma * (N - 1) / (N * alpha) * values.clamp(min=0)
    if loss.variance == "squared":
        return (1 - cost).clamp(min=0).sqrt()
    return torch.where(4 * cost > 1, 1 / (4 * cost), 1.0)


def vicreg_value(loss: VICReg, s: Tensor, values: Tensor, N: int) -> float:
    """VICReg of decorrelated columns with standard deviations s (k,) along eigenvectors of the Laplacian's eigenvalues (k,)."""
    variance = (1 - s.square()).square() if loss.variance == "squared" else (1 - (s.square() + loss.eps).sqrt()).relu()
    invariance = 2 * (N - 1) / N * values * s.square()
    return float((loss.weights["variance"] * variance + loss.weights["invariance"] * invariance).sum())


@optimum.register
def _(loss: SquaredSimCLR, G: Relation, K: int) -> Optimum:
    """Z* = [w_k sqrt(max(t g_k, 0))]: of G's positive eigenvalues only, so the rank is at most their number."""
    N = G.num_rows
    t = loss.target_scale(N, G.degrees.double().sum())
    dims = min(K, N - 1 if loss.center else N)
    taken = leading(spectrum(G, "adjacency", dims, loss.center), dims)
    g = (t * repeat_values(taken)).clamp(min=0)
    return Optimum(
        form="multidimensional scaling",
        kind=EXACT,
        value=float(G.square_norm) - float(g.square().sum()) if loss.reduction == "sum" else -float(g.square().sum()) / N**2,
        singular_values=padded(g.sqrt(), K),
        spaces=keep(taken, g > 0),
        centred=loss.center,
        make=lambda: embed(taken, g.sqrt(), K),
    )


@optimum.register
def _(loss: SimCLR, G: Relation, K: int) -> Optimum:
    """Where G joins M groups of one size m, a regular simplex of M points: exact if K >= M - 1, else a lower bound. For any other
    G the lower bound that each row's softmax can at best be G's own row. What a lower bound says of rank and eigenspaces is that
    of the squared surrogate."""
    surrogate = optimum(SquaredSimCLR("sum"), G, K)
    total = float(G.degrees.double().sum())
    groups = cliques(G)
    if groups is None or len(groups.sizes.unique()) > 1 or total == 0:
        value = row_entropy(G) / (total if loss.reduction == "mean" and total else 1)
        return Optimum("row entropy", LOWER, value, surrogate.singular_values, surrogate.spaces, False, None)
    N, M, m = G.num_rows, len(groups.sizes), int(groups.sizes[0])
    others = (N - m) * math.exp(-(1 + 1 / (M - 1)) / loss.tau) if M > 1 else 0.0
    value = math.log(m - 1 + others) * (1 if loss.reduction == "mean" else total)
    if K < M - 1:
        return Optimum("simplex", LOWER, value, surrogate.singular_values, surrogate.spaces, False, None)

    def make() -> Tensor:
        if M > SIMPLEX_ROWS:
            raise ValueError(f"a simplex of {M} points is too large to write out")
        vertices = helmert(torch.ones(M, dtype=torch.float64), M - 1) * math.sqrt(M / (M - 1)) if M > 1 else torch.ones(1, 1)
        return torch.nn.functional.pad(vertices.double()[groups.y], (0, K - vertices.shape[1]))

    singular_values = padded(torch.full((max(M - 1, 1),), math.sqrt(N / max(M - 1, 1)), dtype=torch.float64), K)
    return Optimum("simplex", EXACT, value, singular_values, surrogate.spaces, False, make)


def row_entropy(G: Relation) -> float:
    """-sum_ij G_ij log(G_ij / d_i), a lower bound of SimCLR's sum; sum_i d_i log d_i where entries are 0 or 1."""
    d = G.degrees.double()
    rows = float(torch.special.xlogy(d, d).sum())
    if torch.equal(G.square_norm, G.degrees.sum()):
        return rows
    weights = G.weights()
    return rows - float(torch.special.xlogy(weights, weights).sum())


@optimum.register
def _(loss: BarlowTwins, G: Relation, K: int) -> Optimum:
    """Z* = D^-1/2 [w_1 ... w_K], the optimum under Z'DZ = I: C = diag(rho), value sum_k (1 - rho_k)^2 (at eps = 0), and 1 for
    every column that there is no dimension for. Without the constraint the loss can go lower, unless the value is 0."""
    d = G.degrees.double().cpu()
    dims = min(K, int((d > 0).sum()) - (1 if loss.center else 0))
    taken = leading(spectrum(G, "normalized", dims, loss.center), dims)
    rho = repeat_values(taken)
    value = float((1 - rho).square().sum()) + K - len(rho)
    scale = torch.where(d > 0, d.clamp(min=1e-300).rsqrt(), 0)[:, None]
    spaces = taken
    if regular := bool((d == d[0]).all()):
        singular_values = padded(torch.full_like(rho, float(scale[0])), K)
    else:
        Z = scale * embed(taken, torch.ones_like(rho), len(rho))
        U, singular, _ = torch.linalg.svd(Z, full_matrices=False)
        singular_values = padded(singular, K)
        if loss.center or cliques(G) is None:  # else D^-1/2 maps each eigenspace to itself
            spaces = [(explicit(float(rho[-1]), U), len(rho))] if len(rho) else []
    return Optimum(
        form="canonical correlation analysis",
        kind=EXACT if value <= 1e-12 * K else UPPER,
        value=value,
        singular_values=singular_values,
        spaces=spaces,
        centred=loss.center and regular,
        make=lambda: scale * embed(taken, torch.ones_like(rho), K),
    )


# What a relation's spectrum says of embeddings and labels


def alignment(U: Tensor, best: Optimum) -> float:
    """The mean squared cosine of the principal angles between U (N, r), the left singular space of an embedding, centred if
    the closed form is, and the nearest of the closed form's spaces: in [0, 1], about dim / N at random."""
    angles = min(U.shape[1], sum(q for _, q in best.spaces))
    return captured(U, best.spaces)[0] / angles if angles else 0.0


def exposed(Y: Tensor, best: Optimum) -> tuple[float, float]:
    """One-hot targets Y (N, C) -> |U'Yc|^2 / |Yc|^2 with U the closed form's eigenvectors: the share of label energy that a
    network trained to the optimum on G shows to a linear probe. The most over what is tied, and the mean."""
    Yc = Y.double() - Y.double().mean(0)
    total = float(Yc.square().sum())
    most, mean = captured(Yc, best.spaces)
    return (most / total, mean / total) if total else (0.0, 0.0)


def label_energy(U: Tensor, Y: Tensor) -> float:
    """U (N, r), the left singular space of an embedding, one-hot targets Y (N, C) -> |U'Yc|^2 / |Yc|^2: the share of the targets'
    variance that a linear probe of the embedding explains on these very rows, about r / N at random."""
    Yc = Y.double() - Y.double().mean(0)
    total = float(Yc.square().sum())
    return float((U.T @ Yc).square().sum()) / total if total else 0.0


def captured(U: Tensor, spaces: list[tuple[Eigenspace, int]]) -> tuple[float, float]:
    """|P U|_F^2 for U (N, r) and the projector P onto the spaces: where only q of a space's dimensions are taken, for the best q
    and for the mean over all choices."""
    most = mean = 0.0
    for space, q in spaces:
        part = U.T @ space.project(U)
        whole = float(part.trace())
        most += whole if q >= min(space.dim, len(part)) else float(torch.linalg.eigvalsh(part)[-q:].clamp(min=0).sum())
        mean += whole * q / space.dim
    return most, mean


def singular_values(Z: Tensor) -> Tensor:
    """Those of Z (N, K) that are not 0 up to roundings: (r,) float64, descending, r the numerical rank. By the smaller Gram
    matrix: half the digits of a singular value decomposition, which do for float32 embeddings, in a fraction of its time."""
    Z = Z.double()
    squares = torch.linalg.eigvalsh(Z @ Z.T if Z.shape[1] > len(Z) else Z.T @ Z)
    values = squares.clamp(min=0).sqrt().flip(0)
    return values[values > rank_tolerance(Z) * values[0]]


def left_singular_space(Z: Tensor) -> Tensor:
    """Z (N, K) -> orthonormal (N, r), r its numerical rank."""
    Z = Z.double()
    wide = Z.shape[1] > len(Z)
    squares, V = torch.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    values = squares.clamp(min=0).sqrt()
    kept = values > rank_tolerance(Z) * values[-1]
    return V[:, kept] if wide else Z @ V[:, kept] / values[kept]


def rank_tolerance(Z: Tensor) -> float:
    """Singular values of Z (N, K) below this share of the largest count as 0: max(N, K) roundings of float32, in which networks
    compute."""
    return max(Z.shape) * torch.finfo(torch.float32).eps


# Spectra


def leading(spaces: Iterator[Eigenspace], k: int) -> list[tuple[Eigenspace, int]]:
    """The first spaces, with how many dimensions of each make up k."""
    taken = []
    for space in spaces:
        if k <= 0:
            break
        taken.append((space, min(space.dim, k)))
        k -= space.dim
    return taken


def repeat_values(taken: list[tuple[Eigenspace, int]]) -> Tensor:
    """The eigenvalue of each dimension taken: (k,) float64."""
    return torch.tensor([space.value for space, q in taken for _ in range(q)], dtype=torch.float64)


def keep(taken: list[tuple[Eigenspace, int]], used: Tensor) -> list[tuple[Eigenspace, int]]:
    """The spaces of which dimensions are used, used (k,) boolean the same throughout a space."""
    starts = np.cumsum([0, *(q for _, q in taken)])
    return [pair for pair, start in zip(taken, starts, strict=False) if used[start]]


def embed(taken: list[tuple[Eigenspace, int]], scales: Tensor, K: int) -> Tensor:
    """The basis vectors of the dimensions taken, times scales (k,), and columns of zeros: (N, K)."""
    vectors = torch.cat([space.basis(q) for space, q in taken], 1) * scales
    return torch.nn.functional.pad(vectors, (0, K - vectors.shape[1]))


def padded(values: Tensor, K: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, K - len(values)))


def spectrum(G: Relation, matrix: str, k: int, center: bool) -> Iterator[Eigenspace]:
    """The eigenspaces of a relation's matrix, leading ones first, at least k dimensions of them.

    "laplacian"   D - G, ascending, orthogonal to 1
    "adjacency"   G, descending; with `center` of HGH, orthogonal to 1
    "normalized"  D^-1/2 G D^-1/2, descending, over the rows with d > 0; with `center` orthogonal to D^1/2 1
    """
    groups, center = cliques(G), center or matrix == "laplacian"
    spaces = general_spectrum(G, matrix, k, center) if groups is None else cliques_spectrum(groups, matrix, center)
    return iter([space for space in spaces if space.dim > 0])


@dataclass
class Groups:
    """A relation that joins every two rows of one group by the group's weight: y (N,) group of each row; sizes, weights (M,)."""

    y: Tensor
    sizes: Tensor
    weights: Tensor


def cliques(G: Relation) -> Groups | None:
    """The groups, if G is of that structure: views, labels, and pairs that happen to be so."""
    if isinstance(G, Views):
        y = torch.arange(G.num_rows) % G.n
        return Groups(y, torch.full((G.n,), G.V), torch.full((G.n,), G.weight, dtype=torch.float64))
    if isinstance(G, Labels):
        _, y, sizes = torch.unique(G.y.cpu(), return_inverse=True, return_counts=True)
        weights = 1 / (sizes - 1).clamp(min=1).double() if G.normalized else torch.ones(len(sizes), dtype=torch.float64)
        return Groups(y, sizes, weights)
    if isinstance(G, Normalized):
        inner = cliques(G.G)
        return inner and Groups(inner.y, inner.sizes, 1 / (inner.sizes - 1).clamp(min=1).double())
    if not torch.equal(G.square_norm, G.degrees.sum()):
        return None
    pairs = G.edges().cpu().numpy()
    y = components(pairs, G.num_rows)
    sizes = torch.bincount(y)
    whole = torch.equal(torch.bincount(y[pairs[0]], minlength=len(sizes)), sizes * (sizes - 1))
    return Groups(y, sizes, torch.ones(len(sizes), dtype=torch.float64)) if whole else None


def components(pairs: np.ndarray, N: int) -> Tensor:
    """The connected component of each row: (N,) int64."""
    graph = scipy.sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(N, N))
    return torch.from_numpy(scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64))


def cliques_spectrum(groups: Groups, matrix: str, center: bool) -> list[Eigenspace]:
    """A clique of m rows and weight w has the eigenvectors 1 and, m - 1 times, those orthogonal to it."""
    m, w, spaces = groups.sizes.double(), groups.weights, []
    one = torch.ones(len(groups.y), dtype=torch.float64)
    if matrix == "laplacian":
        spaces.append(between(0.0, groups.y, one, m > 0, without_sum=True))
        spaces += [within(float(value), groups, (w * m == value) & (m > 1)) for value in torch.unique((w * m)[m > 1])]
    elif matrix == "normalized":
        joined = m > 1
        root = (w * (m - 1)).sqrt()[groups.y]
        spaces.append(between(1.0, groups.y, root, joined, without_sum=center))
        ratios = -1 / (m - 1).clamp(min=1)
        spaces += [within(float(value), groups, (ratios == value) & joined) for value in torch.unique(ratios[joined])]
    else:
        g = w * (m - 1)
        if not center:
            spaces += [between(float(value), groups.y, one, g == value, without_sum=False) for value in torch.unique(g)]
        elif len(torch.unique(g)) == 1:
            spaces.append(between(float(g[0]), groups.y, one, m > 0, without_sum=True))
        else:  # HGH mixes the groups' means, and only them
            t = (m / m.sum()).sqrt()
            H = torch.eye(len(m), dtype=torch.float64) - t[:, None] * t
            values, vectors = torch.linalg.eigh(H @ (g[:, None] * H) - 2 * g.max() * t[:, None] * t)
            onto = torch.nn.functional.one_hot(groups.y).double() / m.sqrt()
            spaces += tied(values[1:], onto @ vectors[:, 1:])
        spaces += [within(float(-value), groups, (w == value) & (m > 1)) for value in torch.unique(w[m > 1])]
    order = 1 if matrix == "laplacian" else -1
    return sorted(spaces, key=lambda space: order * space.value)


def between(value: float, y: Tensor, weights: Tensor, used: Tensor, without_sum: bool) -> Eigenspace:
    """Vectors that are a multiple of the rows' weights (N,) in each group y (N,) that is used (M,), and zero in the others; with
    `without_sum` those of them that are orthogonal to the weights."""
    weights = weights * used[y]
    squares = torch.zeros(len(used), dtype=torch.float64).index_add_(0, y, weights.square())
    norms = squares.sqrt()
    unit = torch.where(used[y], weights / norms[y].clamp(min=1e-300), 0)[:, None]
    t = norms[used]
    number = torch.cumsum(used.long(), 0) - 1  # of each used group among them

    def project(X: Tensor) -> Tensor:
        X = X.double().cpu()
        sums = X.new_zeros(len(used), X.shape[1]).index_add_(0, y, unit * X)
        if without_sum:
            sums = sums - norms[:, None] * (norms @ sums) / squares.sum()
        return unit * sums[y]

    def basis(q: int) -> Tensor:
        coefficients = helmert(t, q) if without_sum else torch.eye(len(t), q, dtype=torch.float64)
        return unit * coefficients[number[y].clamp(min=0)]

    return Eigenspace(value, int(used.sum()) - without_sum, basis, project)


def within(value: float, groups: Groups, used: Tensor) -> Eigenspace:
    """Vectors that sum to zero in each group that is used (M,), and are zero in the others."""
    mine = used[groups.y][:, None]

    def project(X: Tensor) -> Tensor:
        X = X.double().cpu()
        means = X.new_zeros(len(used), X.shape[1]).index_add_(0, groups.y, X) / groups.sizes[:, None]
        return mine * (X - means[groups.y])

    def basis(q: int) -> Tensor:
        columns = []
        for group in used.nonzero()[:, 0]:
            size, members = int(groups.sizes[group]), (groups.y == group).nonzero()[:, 0]
            block = torch.zeros(len(groups.y), min(q, size - 1), dtype=torch.float64)
            block[members] = helmert(torch.ones(size, dtype=torch.float64), block.shape[1])
            columns.append(block)
            q -= block.shape[1]
            if q == 0:
                break
        return torch.cat(columns, 1)

    return Eigenspace(value, int((groups.sizes[used] - 1).sum()), basis, project)


def helmert(t: Tensor, q: int) -> Tensor:
    """The first q of an orthonormal basis of the vectors orthogonal to t (M,), all t > 0: (M, q). Column k has k + 2 entries,
    t_i t_{k+1} for i <= k and then -sum_{i<=k} t_i^2."""
    S = t.square().cumsum(0)
    columns = (t[:, None] * t[1 : q + 1]).triu()
    columns[torch.arange(1, q + 1), torch.arange(q)] = -S[:q]
    return columns / (S[:q] * S[1 : q + 1]).sqrt()


def general_spectrum(G: Relation, matrix: str, k: int, center: bool) -> list[Eigenspace]:
    """By a dense eigensolver up to DENSE rows, by Lanczos (ARPACK) above. What is known of the spectrum beforehand, the vectors
    that are constant on each connected component, is taken out first: Lanczos does not see multiplicities."""
    N = G.num_rows
    pairs = G.edges().cpu().numpy()
    graph = scipy.sparse.csr_array((G.weights().numpy(), tuple(pairs)), shape=(N, N))
    d = np.asarray(graph.sum(1)).ravel()
    y, weights, used = components(pairs, N), torch.ones(N, dtype=torch.float64), None
    if matrix == "normalized":
        root = np.where(d > 0, 1 / np.sqrt(np.maximum(d, 1e-300)), 0)
        graph = scipy.sparse.diags_array(root) @ graph @ scipy.sparse.diags_array(root)
        weights = torch.from_numpy(np.sqrt(d))
        used = torch.bincount(y, weights=weights) > 0
    elif matrix == "laplacian":
        graph = graph - scipy.sparse.diags_array(d)  # -L, so that the leading eigenvalues are the largest
        used = torch.bincount(y) > 0
    spaces, known = [], None
    if used is not None:
        known = between(1.0 if matrix == "normalized" else 0.0, y, weights, used, without_sum=False)
        spaces = [between(known.value, y, weights, used, without_sum=center)]
    elif center:
        known = between(0.0, torch.zeros(N, dtype=torch.long), weights, torch.ones(1, dtype=torch.bool), without_sum=False)
    missing = min(k - sum(space.dim for space in spaces), N - (known.dim if known else 0))
    if matrix == "normalized":
        missing = min(missing, int((d > 0).sum()) - spaces[0].dim - center)
    if missing <= 0:
        return spaces
    bound = 3 * max(1.0, float(d.max())) + 1  # more than the spread of any of the three spectra

    def deflated(x: np.ndarray) -> np.ndarray:
        """The matrix with the known vectors moved below all others, and rows without a positive too."""
        x = x.reshape(N, -1)
        if matrix == "adjacency" and center:
            out = graph @ (x - x.mean(0))
            out = out - out.mean(0)
        else:
            out = graph @ x
        if known is not None:
            out = out - bound * known.project(torch.from_numpy(np.ascontiguousarray(x))).numpy()
        if matrix == "normalized":
            out = out - bound * np.where(d > 0, 0, 1)[:, None] * x
        return out

    if N <= DENSE:
        values, vectors = scipy.linalg.eigh(deflated(np.eye(N)), driver="evd")  # "evr" can fail on high multiplicities
    else:
        wrapped = scipy.sparse.linalg.LinearOperator((N, N), matvec=deflated, matmat=deflated, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(N)
        values, vectors = scipy.sparse.linalg.eigsh(wrapped, k=min(missing + 1, N - 1), which="LA", v0=start)
    order = np.argsort(-values)[: missing + 1]
    found = tied(torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy()))
    if matrix == "laplacian":
        for space in found:
            space.value = max(0.0, -space.value)
    return spaces + found


def tied(values: Tensor, vectors: Tensor) -> list[Eigenspace]:
    """Eigenpairs (k,), (N, k) -> their eigenspaces, in descending order; each vector's largest entry is positive."""
    order = values.argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    scale = max(1.0, float(values.abs().max())) if len(values) else 1.0
    cuts = ((values[:-1] - values[1:]) > TIE * scale).nonzero()[:, 0] + 1
    starts = [0, *cuts.tolist(), len(values)]
    return [explicit(float(values[a:b].mean()), vectors[:, a:b]) for a, b in itertools.pairwise(starts) if b > a]


def explicit(value: float, vectors: Tensor) -> Eigenspace:
    """The eigenspace that orthonormal vectors (N, dim) span."""
    return Eigenspace(value, vectors.shape[1], lambda q: vectors[:, :q], lambda X: vectors @ (vectors.T @ X.double().cpu()))
