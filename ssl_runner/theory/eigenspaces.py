"""Leading eigenspaces of a relation's matrices, in float64.

They are known by structure if G consists of groups, and computed by eigensolvers otherwise. Eigenvalues can
have high multiplicity: for views, any K of n leading eigenvectors are optimal. A spectrum is therefore a list
of eigenspaces. Each is complete, except that Lanczos may truncate a large one (lanczos.MAX_EXTRA_VECTORS).
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
from ssl_runner.theory.lanczos import lanczos
from ssl_runner.theory.matrices import HOST, TIE_TOLERANCE, as_float64, helmert

MAX_DENSE_ROWS = 2000  # larger connected components are decomposed iteratively


@dataclass
class Eigenspace:
    """Eigenspace P of one eigenvalue.

    value    eigenvalue
    dim      dimension
    basis    q <= dim -> first q vectors of an orthonormal basis (N, q), float64
    project  X (N, C) -> P X (N, C), float64
    """

    value: float
    dim: int
    basis: Callable[[int], Tensor]
    project: Callable[[Tensor], Tensor]


def leading_eigenspaces(G: Relation, matrix: str, k: int, center: bool = False) -> list[Eigenspace]:
    """Leading eigenspaces of a matrix (N, N) of G, of at least k dimensions in total if there are as many.

    "laplacian"   D - G, ascending, orthogonal to 1
    "adjacency"   G, descending; with `center`, HGH with H = I - 11'/N, orthogonal to 1
    "normalized"  D^-1/2 G D^-1/2, descending, on the rows with d > 0; with `center`, orthogonal to D^1/2 1

    For the last two, connected components of more than MAX_DENSE_ROWS rows contribute only positive
    eigenvalues.
    """
    groups = find_groups(G)
    if groups is not None:
        spaces = clique_eigenspaces(groups, matrix, center)
    elif matrix == "adjacency" and center:
        spaces = centred_eigenspaces(to_sparse(G), k)
    else:
        spaces = component_eigenspaces(to_sparse(G), matrix, k, center)
    return [space for space in spaces if space.dim > 0]


# Relations that consist of groups: two rows are positives iff they are in the same group


@dataclass
class Groups:
    """Group y (N,) of each row, and size m (M,) and row degree (M,) of each group."""

    y: Tensor
    sizes: Tensor
    degrees: Tensor

    @property
    def weights(self) -> Tensor:
        """G_ij within each group, degree / (m - 1): (M,)."""
        return self.degrees / (self.sizes - 1).clamp(min=1)


def find_groups(G: Relation) -> Groups | None:
    """The groups that G consists of, None for any other G.

    A subclass may override the product, so only the exact types have known groups.
    """
    if type(G) is Views:
        y = torch.arange(G.num_rows, device="cpu") % G.n
        return Groups(y, torch.full((G.n,), G.V, device="cpu"), G.degrees[: G.n].cpu().double())
    if type(G) is Labels:
        _, y, m = torch.unique(G.y.cpu(), return_inverse=True, return_counts=True)
        return Groups(y, m, (m - 1).clamp(max=1 if G.normalized else G.num_rows).double())
    if type(G) is DegreeNormalized:
        inner = find_groups(G.G)
        return inner and Groups(inner.y, inner.sizes, inner.degrees.clamp(max=1))
    if not bool((G.weights() == 1).all()):
        return None
    pairs = G.edges().cpu().numpy()
    y = connected_components(
        scipy.sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(G.num_rows, G.num_rows))
    )
    m = torch.bincount(y)
    complete = torch.equal(torch.bincount(y[pairs[0]], minlength=len(m)), m * (m - 1))
    return Groups(y, m, (m - 1).double()) if complete else None


def connected_components(graph: scipy.sparse.sparray) -> Tensor:
    """Connected component of each row: (N,) int64."""
    return torch.from_numpy(
        scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
    )


def clique_eigenspaces(groups: Groups, matrix: str, center: bool) -> list[Eigenspace]:
    """All eigenspaces of the matrix, for groups of m rows with weight w and degree d = w (m - 1).

    In each group the vector 1 has the eigenvalue d of G, and the m - 1 dimensions orthogonal to it have -w.
    """
    m, w, d = groups.sizes.double(), groups.weights, groups.degrees
    joined, one = m > 1, torch.ones(len(groups.y), **HOST)
    if matrix == "laplacian":
        first = [group_constant_space(0.0, groups.y, one, m > 0, one)]
        inner = w * m
    elif matrix == "normalized":
        root = d.sqrt()[groups.y]
        first = [group_constant_space(1.0, groups.y, root, joined, root if center else None)]
        inner = -1 / (m - 1).clamp(min=1)
    else:
        first = [
            group_constant_space(float(g), groups.y, one, d == g, one if center else None)
            for g in torch.unique(d)
        ]
        if center:
            first += centred_group_spaces(groups)
        inner = -w
    spaces = first + [
        zero_sum_space(float(value), groups, (inner == value) & joined)
        for value in torch.unique(inner[joined])
    ]
    return sorted(spaces, key=lambda space: space.value if matrix == "laplacian" else -space.value)


def centred_group_spaces(groups: Groups) -> list[Eigenspace]:
    """Eigenspaces of HGH in the span of the indicator vectors of the u distinct degrees, orthogonal to 1.

    HGH mixes these vectors; the rest of the group-constant vectors are eigenvectors of G already.
    """
    degrees, of_row = torch.unique(groups.degrees[groups.y], return_inverse=True)
    rows = torch.bincount(of_row).double()
    t = (rows / rows.sum()).sqrt()
    H = torch.eye(len(t), **HOST) - t[:, None] * t
    values, vectors = torch.linalg.eigh(H @ (degrees[:, None] * H) - 2 * (degrees.max() + 1) * t[:, None] * t)
    return group_ties(values[1:].numpy(), (vectors[:, 1:] / rows.sqrt()[:, None])[of_row].numpy())


def group_constant_space(
    value: float, y: Tensor, weights: Tensor, used: Tensor, orthogonal: Tensor | None = None
) -> Eigenspace:
    """Vectors that are a multiple of weights (N,) in each used group, and zero in the other groups.

    y (N,): group of each row. used (M,): boolean. orthogonal (N,) > 0: if given, keep only the vectors
    orthogonal to it.
    """
    weights = weights * used[y]
    squares = torch.zeros(len(used), **HOST).index_add_(0, y, weights.square())
    norms = squares.sqrt()
    unit = torch.where(used[y], weights / norms[y].clamp(min=1e-300), 0)[:, None]
    t = torch.zeros_like(norms).index_add_(0, y, unit[:, 0] * orthogonal) if orthogonal is not None else None
    position = torch.cumsum(used.long(), 0) - 1  # of each used group among the used ones

    def project(X: Tensor) -> Tensor:
        X = as_float64(X)
        sums = X.new_zeros(len(used), X.shape[1]).index_add_(0, y, unit * X)
        if t is not None:
            sums = sums - t[:, None] * (t @ sums) / t.square().sum()
        return unit * sums[y]

    def basis(q: int) -> Tensor:
        coefficients = torch.eye(int(used.sum()), q, **HOST) if t is None else helmert(t[used], q)
        return unit * coefficients[position[y].clamp(min=0)]

    return Eigenspace(value, max(int(used.sum()) - (t is not None), 0), basis, project)


def zero_sum_space(value: float, groups: Groups, used: Tensor) -> Eigenspace:
    """Vectors that sum to zero in each used group (M,), and are zero in the other groups."""
    in_used = used[groups.y][:, None]

    def project(X: Tensor) -> Tensor:
        X = as_float64(X)
        means = X.new_zeros(len(used), X.shape[1]).index_add_(0, groups.y, X) / groups.sizes[:, None]
        return in_used * (X - means[groups.y])

    def basis(q: int) -> Tensor:
        columns = []
        for group in used.nonzero()[:, 0]:
            size, members = int(groups.sizes[group]), (groups.y == group).nonzero()[:, 0]
            block = torch.zeros(len(groups.y), min(q, size - 1), **HOST)
            block[members] = helmert(torch.ones(size, **HOST), block.shape[1])
            columns.append(block)
            q -= block.shape[1]
            if q == 0:
                break
        return torch.cat(columns, 1)

    return Eigenspace(value, int((groups.sizes[used] - 1).sum()), basis, project)


# Other relations


def to_sparse(G: Relation) -> scipy.sparse.csr_array:
    """G as a sparse (N, N) matrix, float64."""
    return scipy.sparse.csr_array(
        (G.weights().numpy(), tuple(G.edges().cpu().numpy())), shape=(G.num_rows,) * 2
    )


def component_eigenspaces(
    graph: scipy.sparse.csr_array, matrix: str, k: int, center: bool
) -> list[Eigenspace]:
    """`leading_eigenspaces` from the connected components, each of which has its own eigenvectors.

    Components of up to MAX_DENSE_ROWS rows are decomposed densely, larger ones by Lanczos. Each component has
    one eigenvalue 0 of the Laplacian and one eigenvalue 1 of the normalised matrix, with a known eigenvector:
    these are removed first.
    """
    d, y = np.asarray(graph.sum(1)).ravel(), connected_components(graph)
    sizes = torch.bincount(y)
    first, top, weights = [], float(d.max(initial=0)), np.zeros(len(d))
    if matrix == "laplacian":
        graph, top, weights = graph - scipy.sparse.diags_array(d), 0.0, np.ones(len(d))  # -L, descending
        one = torch.from_numpy(weights)
        first = [group_constant_space(0.0, y, one, sizes > 0, one)]
    elif matrix == "normalized":
        root = scipy.sparse.diags_array(np.where(d > 0, 1 / np.sqrt(np.maximum(d, 1e-300)), 0))
        graph, top, weights = root @ graph @ root, 1.0, np.sqrt(d)
        roots = torch.from_numpy(weights)
        first = [group_constant_space(1.0, y, roots, sizes > 1, roots if center else None)]
    missing = k - sum(space.dim for space in first)
    if missing <= 0:
        return first

    rows = np.argsort(y.numpy(), kind="stable")
    starts = np.cumsum([0, *sizes[:-1].tolist()])
    # subtracted from the eigenvalue of a known vector, to move it below all others
    spread = 2 * (abs(top) + float(abs(graph).sum(1).max(initial=0))) + 1
    found = []  # for c components of m rows: eigenvalues (c, q), eigenvectors (c, m, q), rows (c, m)
    for m in torch.unique(sizes[sizes > (0 if matrix == "adjacency" else 1)]).tolist():
        members = rows[starts[sizes.numpy() == m][:, None] + np.arange(m)]
        known = weights[members]
        known = known / np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-300)
        if m <= max(MAX_DENSE_ROWS, 2):  # ARPACK needs at least 3 rows
            deflation = spread * known[:, :, None] * known[:, None, :]
            values, vectors = np.linalg.eigh(component_blocks(graph, members) - deflation)
            found.append((values, vectors, members))
        else:
            for own, vector in zip(members, known, strict=True):
                block = graph[own][:, own]
                deflated = np.empty((m, 0)) if matrix == "adjacency" else vector[:, None]
                smallest = -np.inf if matrix == "laplacian" else TIE_TOLERANCE
                number = min(missing, m - deflated.shape[1])
                values, vectors = lanczos(block, deflated, number, top, spread, smallest)
                found.append((values[None], vectors[None], own[None]))
    candidates = np.concatenate([values.ravel() for values, _, _ in found]) if found else np.empty(0)
    candidates = np.sort(candidates[candidates > top - spread / 2])[::-1]
    if not len(candidates):
        return first
    threshold = candidates[min(missing, len(candidates)) - 1] - TIE_TOLERANCE * max(1.0, abs(candidates[0]))
    values, vectors = select_eigenpairs(found, max(threshold, top - spread / 2), len(d))
    rest = group_ties(values, vectors)
    if matrix == "laplacian":
        for space in rest:
            space.value = max(0.0, -space.value)
    return first + rest


def component_blocks(graph: scipy.sparse.csr_array, members: np.ndarray) -> np.ndarray:
    """Dense matrices (c, m, m) of c components, from their rows (c, m)."""
    m, rows = members.shape[1], members.ravel()
    own = graph[rows][:, rows].tocoo()
    i, j = own.coords
    dense = np.zeros((len(members), m, m))
    dense[i // m, i % m, j % m] = own.data
    return dense


def select_eigenpairs(
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], threshold: float, N: int
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Eigenpairs of the components with a value of at least `threshold`: values (k,), sparse vectors (N, k).

    found: eigenvalues (c, q), eigenvectors (c, m, q) and rows (c, m) of c components of m rows each.
    """
    chosen: list[np.ndarray] = []
    data, rows, columns = [], [], []
    for values, vectors, members in found:
        component, pair = np.nonzero(values >= threshold)
        selected = vectors[component, :, pair]  # (pairs, m)
        data.append(selected.ravel())
        rows.append(members[component].ravel())
        columns.append(np.repeat(sum(c.size for c in chosen) + np.arange(len(selected)), selected.shape[1]))
        chosen.append(values[component, pair])
    values = np.concatenate(chosen)
    entries = (np.concatenate(data), (np.concatenate(rows), np.concatenate(columns)))
    return values, scipy.sparse.csr_array(entries, shape=(N, len(values)))


def centred_eigenspaces(graph: scipy.sparse.csr_array, k: int) -> list[Eigenspace]:
    """Leading eigenspaces of HGH, orthogonal to 1, of k dimensions. HGH has no connected components."""
    N = graph.shape[0]
    k = min(k, N - 1)
    if k <= 0:
        return []
    if N <= MAX_DENSE_ROWS:
        H = np.eye(N) - 1 / N
        values, vectors = scipy.linalg.eigh(H @ graph @ H - (2 * graph.sum(1).max() + 1) / N, driver="evd")
        values, vectors = values[:0:-1], vectors[:, :0:-1]  # "evr" can fail on high multiplicities
        last = int((values >= values[k - 1] - TIE_TOLERANCE * max(1.0, abs(values[0]))).sum())
        return group_ties(values[:last], vectors[:, :last])

    def product(x: np.ndarray) -> np.ndarray:
        y = graph @ (x - x.mean(0))
        return y - y.mean(0)

    centred = scipy.sparse.linalg.LinearOperator((N, N), matvec=product, matmat=product, dtype=np.float64)
    top = float(graph.sum(1).max())
    return group_ties(*lanczos(centred, np.full((N, 1), N**-0.5), k, top, 4 * top + 1, TIE_TOLERANCE))


def group_ties(values: np.ndarray, vectors: np.ndarray | scipy.sparse.csr_array) -> list[Eigenspace]:
    """Group eigenpairs (k,), (N, k) into eigenspaces, in descending order of value.

    Signs are fixed: the entry of largest magnitude of each vector is positive.
    """
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    largest = np.asarray(abs(vectors).argmax(0)).ravel()
    signs = np.sign(np.asarray(vectors[largest, np.arange(len(values))]).ravel())
    vectors = (
        vectors * signs if isinstance(vectors, np.ndarray) else vectors @ scipy.sparse.diags_array(signs)
    )
    gap = TIE_TOLERANCE * max(1.0, float(abs(values).max(initial=0)))
    cuts = np.nonzero(values[:-1] - values[1:] > gap)[0] + 1
    return [
        explicit_space(float(values[a:b].mean()), vectors[:, a:b])
        for a, b in pairwise([0, *cuts.tolist(), len(values)])
        if b > a
    ]


def explicit_space(value: float, vectors: np.ndarray | scipy.sparse.csr_array) -> Eigenspace:
    """Span of orthonormal vectors (N, dim)."""

    def basis(q: int) -> Tensor:
        columns = vectors[:, :q]
        dense = columns if isinstance(columns, np.ndarray) else columns.toarray()
        return torch.from_numpy(np.ascontiguousarray(dense))

    def project(X: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(vectors @ (vectors.T @ as_float64(X).numpy())))

    return Eigenspace(value, vectors.shape[1], basis, project)
