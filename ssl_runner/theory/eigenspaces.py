"""The leading eigenspaces of a relation's matrices, in float64: by structure where G joins groups, by eigensolvers elsewhere.

The matrices have eigenvalues of high multiplicity: where G relates views, any K of its n leading eigenvectors will do. So a
spectrum is a list of eigenspaces, each complete (but see CROWD).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from ssl_runner.relation import DegreeNormalized, Labels, Relation, Views

DENSE = 2000  # rows of a connected component up to which it is decomposed whole, not iteratively
TIE = 1e-9  # eigenvalues this near to each other, relative to the largest, are one eigenspace; this near to 0 they are 0
CROWD = (
    256  # vectors beyond k that are looked for in one such component; a larger eigenspace is cut short there
)
PRODUCTS = 10_000  # of a matrix and a vector that Lanczos may take, about
SPARSE = 8  # entries a row of a matrix up to which it is inverted where Lanczos takes more


@dataclass
class Eigenspace:
    """All vectors of one eigenvalue: their dimension, the first q of an orthonormal basis (N, q), the projector onto them."""

    value: float
    dim: int
    basis: Callable[[int], Tensor]
    project: Callable[[Tensor], Tensor]


def spectrum(G: Relation, matrix: str, k: int, center: bool = False) -> list[Eigenspace]:
    """The eigenspaces of a relation's matrix, leading ones first, at least k dimensions of them where there are so many; of the
    last two matrices, in components of more than DENSE rows, only those of positive eigenvalues.

    "laplacian"   D - G, ascending, orthogonal to 1
    "adjacency"   G, descending; with `center` of HGH, orthogonal to 1
    "normalized"  D^-1/2 G D^-1/2, descending, over the rows with d > 0; with `center` orthogonal to D^1/2 1
    """
    groups = cliques(G)
    if groups is not None:
        spaces = cliques_spectrum(groups, matrix, center)
    elif matrix == "adjacency" and center:
        spaces = centred_spectrum(sparse(G), k)
    else:
        spaces = components_spectrum(sparse(G), matrix, k, center)
    return [space for space in spaces if space.dim > 0]


# Groups: G joins every two rows of one group, and no others


@dataclass
class Groups:
    """y (N,): the group of each row; sizes m (M,); degrees (M,) of their rows, whose pairs weigh degree / (m - 1) each."""

    y: Tensor
    sizes: Tensor
    degrees: Tensor

    @property
    def weights(self) -> Tensor:
        return self.degrees / (self.sizes - 1).clamp(min=1)


def cliques(G: Relation) -> Groups | None:
    """The groups, if G is of that structure: views, labels, and pairs that happen to be so."""
    if isinstance(G, Views):
        return Groups(
            torch.arange(G.num_rows) % G.n, torch.full((G.n,), G.V), G.degrees[: G.n].cpu().double()
        )
    if isinstance(G, Labels):
        _, y, m = torch.unique(G.y.cpu(), return_inverse=True, return_counts=True)
        return Groups(y, m, (m - 1).clamp(max=1 if G.normalized else G.num_rows).double())
    if isinstance(G, DegreeNormalized):
        inner = cliques(G.G)
        return inner and Groups(inner.y, inner.sizes, inner.degrees.clamp(max=1))
    if not bool((G.weights() == 1).all()):
        return None
    pairs = G.edges().cpu().numpy()
    y = components(
        scipy.sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(G.num_rows, G.num_rows))
    )
    m = torch.bincount(y)
    whole = torch.equal(torch.bincount(y[pairs[0]], minlength=len(m)), m * (m - 1))
    return Groups(y, m, (m - 1).double()) if whole else None


def components(graph: scipy.sparse.sparray) -> Tensor:
    """The connected component of each row: (N,) int64."""
    return torch.from_numpy(
        scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
    )


def cliques_spectrum(groups: Groups, matrix: str, center: bool) -> list[Eigenspace]:
    """A clique of m rows, weight w and degree w (m - 1) has the eigenvectors 1 and, m - 1 times, those orthogonal to it."""
    m, w, d = groups.sizes.double(), groups.weights, groups.degrees
    joined, one = m > 1, torch.ones(len(groups.y), dtype=torch.float64)
    if matrix == "laplacian":
        first = [between(0.0, groups.y, one, m > 0, one)]
        inner = w * m
    elif matrix == "normalized":
        root = d.sqrt()[groups.y]
        first = [between(1.0, groups.y, root, joined, root if center else None)]
        inner = -1 / (m - 1).clamp(min=1)
    else:
        first = [between(float(g), groups.y, one, d == g, one if center else None) for g in torch.unique(d)]
        if center:
            first += centred_means(groups)
        inner = -w
    spaces = first + [
        within(float(value), groups, (inner == value) & joined) for value in torch.unique(inner[joined])
    ]
    return sorted(spaces, key=lambda space: space.value if matrix == "laplacian" else -space.value)


def centred_means(groups: Groups) -> list[Eigenspace]:
    """What HGH mixes beside what `between` leaves alone: the u vectors that are 1 on all rows of one degree, less their mean."""
    degrees, of_row = torch.unique(groups.degrees[groups.y], return_inverse=True)
    rows = torch.bincount(of_row).double()
    t = (rows / rows.sum()).sqrt()
    H = torch.eye(len(t), dtype=torch.float64) - t[:, None] * t
    values, vectors = torch.linalg.eigh(H @ (degrees[:, None] * H) - 2 * (degrees.max() + 1) * t[:, None] * t)
    return tied(values[1:].numpy(), (vectors[:, 1:] / rows.sqrt()[:, None])[of_row].numpy())


def between(
    value: float, y: Tensor, weights: Tensor, used: Tensor, orthogonal: Tensor | None = None
) -> Eigenspace:
    """Vectors that are a multiple of the rows' weights (N,) in each group y (N,) that is used (M,), and zero in the others; of
    these, if a vector (N,) > 0 is given, those that are orthogonal to it."""
    weights = weights * used[y]
    squares = torch.zeros(len(used), dtype=torch.float64).index_add_(0, y, weights.square())
    norms = squares.sqrt()
    unit = torch.where(used[y], weights / norms[y].clamp(min=1e-300), 0)[:, None]
    t = torch.zeros_like(norms).index_add_(0, y, unit[:, 0] * orthogonal) if orthogonal is not None else None
    number = torch.cumsum(used.long(), 0) - 1  # of each used group among them

    def project(X: Tensor) -> Tensor:
        X = X.cpu().double()
        sums = X.new_zeros(len(used), X.shape[1]).index_add_(0, y, unit * X)
        if t is not None:
            sums = sums - t[:, None] * (t @ sums) / t.square().sum()
        return unit * sums[y]

    def basis(q: int) -> Tensor:
        coefficients = (
            torch.eye(int(used.sum()), q, dtype=torch.float64) if t is None else helmert(t[used], q)
        )
        return unit * coefficients[number[y].clamp(min=0)]

    return Eigenspace(value, max(int(used.sum()) - (t is not None), 0), basis, project)


def within(value: float, groups: Groups, used: Tensor) -> Eigenspace:
    """Vectors that sum to zero in each group that is used (M,), and are zero in the others."""
    mine = used[groups.y][:, None]

    def project(X: Tensor) -> Tensor:
        X = X.cpu().double()
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


# Any other relation


def sparse(G: Relation) -> scipy.sparse.csr_array:
    """G as a sparse matrix, float64."""
    return scipy.sparse.csr_array(
        (G.weights().numpy(), tuple(G.edges().cpu().numpy())), shape=(G.num_rows,) * 2
    )


def components_spectrum(graph: scipy.sparse.csr_array, matrix: str, k: int, center: bool) -> list[Eigenspace]:
    """Component by component, since each has eigenvectors of its own: whole up to DENSE rows, by Lanczos above. The Laplacian's
    zeros and the normalised matrix's ones, of which there is one a component, are known beforehand and taken out first."""
    d, y = np.asarray(graph.sum(1)).ravel(), components(graph)
    sizes = torch.bincount(y)
    first, top, weights = [], float(d.max(initial=0)), np.zeros(len(d))
    if matrix == "laplacian":
        graph, top, weights = (
            graph - scipy.sparse.diags_array(d),
            0.0,
            np.ones(len(d)),
        )  # -L: its largest come first
        one = torch.from_numpy(weights)
        first = [between(0.0, y, one, sizes > 0, one)]
    elif matrix == "normalized":
        root = scipy.sparse.diags_array(np.where(d > 0, 1 / np.sqrt(np.maximum(d, 1e-300)), 0))
        graph, top, weights = root @ graph @ root, 1.0, np.sqrt(d)
        roots = torch.from_numpy(weights)
        first = [between(1.0, y, roots, sizes > 1, roots if center else None)]
    missing = k - sum(space.dim for space in first)
    if missing <= 0:
        return first

    rows = np.argsort(y.numpy(), kind="stable")
    starts = np.cumsum([0, *sizes[:-1].tolist()])
    spread = (
        2 * (abs(top) + float(abs(graph).sum(1).max(initial=0))) + 1
    )  # what moves a known vector below all others
    found = []  # eigenvalues (c, q), eigenvectors (c, m, q) and rows (c, m) of c components
    for m in torch.unique(sizes[sizes > (0 if matrix == "adjacency" else 1)]).tolist():
        members = rows[starts[sizes.numpy() == m][:, None] + np.arange(m)]
        known = weights[members]
        known = known / np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-300)
        if m <= max(DENSE, 2):  # which ARPACK does not take
            values, vectors = np.linalg.eigh(
                blocks(graph, members) - spread * known[:, :, None] * known[:, None, :]
            )
            found.append((values, vectors, members))
        else:
            for own, vector in zip(members, known, strict=True):
                block = graph[own][:, own]
                deflated = np.empty((m, 0)) if matrix == "adjacency" else vector[:, None]
                least = -np.inf if matrix == "laplacian" else TIE
                values, vectors = lanczos(
                    block, deflated, min(missing, m - deflated.shape[1]), top, spread, least
                )
                found.append((values[None], vectors[None], own[None]))
    everything = np.concatenate([values.ravel() for values, _, _ in found]) if found else np.empty(0)
    everything = np.sort(everything[everything > top - spread / 2])[::-1]
    if not len(everything):
        return first
    least = everything[min(missing, len(everything)) - 1] - TIE * max(1.0, abs(everything[0]))
    values, vectors = assembled(found, max(least, top - spread / 2), len(d))
    rest = tied(values, vectors)
    if matrix == "laplacian":
        for space in rest:
            space.value = max(0.0, -space.value)
    return first + rest


def blocks(graph: scipy.sparse.csr_array, members: np.ndarray) -> np.ndarray:
    """The rows (c, m) of c components -> each component's matrix (c, m, m)."""
    m, rows = members.shape[1], members.ravel()
    own = graph[rows][:, rows].tocoo()
    i, j = own.coords
    dense = np.zeros((len(members), m, m))
    dense[i // m, i % m, j % m] = own.data
    return dense


def assembled(
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], least: float, N: int
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Of the eigenpairs of components those with a value of at least `least`: values (k,), vectors (N, k)."""
    chosen: list[np.ndarray] = []
    data, rows, columns = [], [], []
    for values, vectors, members in found:
        component, which = np.nonzero(values >= least)
        taken = vectors[component, :, which]  # (pairs, m)
        data.append(taken.ravel())
        rows.append(members[component].ravel())
        columns.append(np.repeat(sum(c.size for c in chosen) + np.arange(len(taken)), taken.shape[1]))
        chosen.append(values[component, which])
    values = np.concatenate(chosen)
    entries = (np.concatenate(data), (np.concatenate(rows), np.concatenate(columns)))
    return values, scipy.sparse.csr_array(entries, shape=(N, len(values)))


def centred_spectrum(graph: scipy.sparse.csr_array, k: int) -> list[Eigenspace]:
    """Of HGH, orthogonal to 1: this one does not fall into components."""
    N = graph.shape[0]
    k = min(k, N - 1)
    if k <= 0:
        return []
    if N <= DENSE:
        H = np.eye(N) - 1 / N
        values, vectors = scipy.linalg.eigh(H @ graph @ H - (2 * graph.sum(1).max() + 1) / N, driver="evd")
        values, vectors = values[:0:-1], vectors[:, :0:-1]  # "evr" can fail on high multiplicities
        last = int((values >= values[k - 1] - TIE * max(1.0, abs(values[0]))).sum())
        return tied(values[:last], vectors[:, :last])

    def product(x: np.ndarray) -> np.ndarray:
        y = graph @ (x - x.mean(0))
        return y - y.mean(0)

    centred = scipy.sparse.linalg.LinearOperator((N, N), matvec=product, matmat=product, dtype=np.float64)
    top = float(graph.sum(1).max())
    return tied(*lanczos(centred, np.full((N, 1), N**-0.5), k, top, 4 * top + 1, TIE))


def lanczos(
    A: scipy.sparse.csr_array | scipy.sparse.linalg.LinearOperator,
    known: np.ndarray,
    k: int,
    top: float,
    spread: float,
    least: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenpairs of A (m, m) above `least` that are orthogonal to known ones (m, r): values, vectors, in descending
    order. No eigenvalue is above `top`, nor `spread` below the largest.

    ARPACK may see one vector of a multiple eigenvalue. So it is asked again for what is orthogonal to all that it has found,
    until that is smaller than the k-th value, or does not converge, or CROWD vectors are tied with the k-th. Where eigenvalues
    crowd at the end, as on paths and grids, it does not converge; a matrix of few entries is then inverted around `top`.
    """
    m, r = known.shape
    tie, shift = TIE * max(1.0, abs(top)), top + 1e-7 * max(1.0, abs(top))
    found, values, number, inverse = known, np.empty(0), k, None
    while found.shape[1] < min(m, r + k + CROWD):
        operator = without(A, found, spread) if inverse is None else inverted(inverse, found)
        try:
            new, vectors = largest(operator, min(number, m - found.shape[1], m - 1), seed=found.shape[1])
        except scipy.sparse.linalg.ArpackError as error:
            if inverse is None and scipy.sparse.issparse(A) and A.nnz <= SPARSE * m:
                inverse = scipy.sparse.linalg.splu(
                    scipy.sparse.csc_array(shift * scipy.sparse.eye_array(m) - A)
                )
                continue
            if len(values):
                break
            raise ValueError(
                f"{k} leading eigenvectors of a component of {m} rows were not found ({error}): lower K"
            ) from error
        if inverse is not None:
            new = shift - 1 / new
        kth = np.sort(values)[-k] if len(values) >= k else -np.inf
        if new.max() < max(kth - tie, least):
            break
        vectors, _ = np.linalg.qr(vectors - found @ (found.T @ vectors))
        found, values = np.concatenate([found, vectors], 1), np.concatenate([values, new])
        number = 1 if len(values) == k else 2 * number
    order = np.argsort(-values)
    order = (
        order[values[order] >= max(values[order[min(k, len(order)) - 1]] - tie, least)]
        if len(order)
        else order
    )
    return values[order], found[:, r:][:, order]


def without(
    A: scipy.sparse.csr_array | scipy.sparse.linalg.LinearOperator, found: np.ndarray, spread: float
) -> scipy.sparse.linalg.LinearOperator:
    """A (m, m) with the eigenvectors found (m, r) moved below all others."""

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(found), -1)
        return A @ x - spread * (found @ (found.T @ x))

    return scipy.sparse.linalg.LinearOperator(A.shape, product, matmat=product, dtype=float)


def inverted(inverse: scipy.sparse.linalg.SuperLU, found: np.ndarray) -> scipy.sparse.linalg.LinearOperator:
    """The inverse of a factorised matrix, 0 on the eigenvectors found (m, r)."""

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(found), -1)
        y = inverse.solve(x - found @ (found.T @ x))
        return y - found @ (found.T @ y)

    return scipy.sparse.linalg.LinearOperator(inverse.shape, product, matmat=product, dtype=float)


def largest(operator: scipy.sparse.linalg.LinearOperator, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenpairs, as far as ARPACK sees them within PRODUCTS. Raises ArpackError."""
    m = operator.shape[0]
    ncv = min(m, max(2 * k + 1, 100))
    start = np.random.default_rng(seed).standard_normal(m)
    return scipy.sparse.linalg.eigsh(
        operator, k, which="LA", v0=start, ncv=ncv, maxiter=max(PRODUCTS // ncv, 10)
    )


def tied(values: np.ndarray, vectors: np.ndarray | scipy.sparse.csr_array) -> list[Eigenspace]:
    """Eigenpairs (k,), (N, k) -> their eigenspaces, in descending order; each vector's largest entry is positive."""
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    at = np.asarray(abs(vectors).argmax(0)).ravel()
    signs = np.sign(np.asarray(vectors[at, np.arange(len(values))]).ravel())
    vectors = (
        vectors * signs if isinstance(vectors, np.ndarray) else vectors @ scipy.sparse.diags_array(signs)
    )
    cuts = np.nonzero(values[:-1] - values[1:] > TIE * max(1.0, float(abs(values).max(initial=0))))[0] + 1
    return [
        explicit(float(values[a:b].mean()), vectors[:, a:b])
        for a, b in pairwise([0, *cuts.tolist(), len(values)])
        if b > a
    ]


def explicit(value: float, vectors: np.ndarray | scipy.sparse.csr_array) -> Eigenspace:
    """The eigenspace that orthonormal vectors (N, dim) span."""

    def basis(q: int) -> Tensor:
        some = vectors[:, :q]
        return torch.from_numpy(
            np.ascontiguousarray(some if isinstance(some, np.ndarray) else some.toarray())
        )

    return Eigenspace(
        value,
        vectors.shape[1],
        basis,
        lambda X: torch.from_numpy(np.ascontiguousarray(vectors @ (vectors.T @ X.cpu().double().numpy()))),
    )
