"""Closed-form optima of the losses for free embeddings, in float64.

Each loss is a function of (Z, G). Its optimum is a spectral embedding of G (Balestriero & LeCun 2022,
arXiv:2205.11508) by the K leading eigenvectors of

    VICReg, squared         L = D - G, orthogonal to 1, ascending    Laplacian eigenmaps
    spectral contrastive    G, descending                            multidimensional scaling (ISOMAP)
    Barlow Twins            D^-1/2 G D^-1/2, descending              canonical correlation analysis (views),
                                                                     linear discriminant analysis (labels)

The optimum uses the leading eigenspaces entirely; within the last one any subspace of the remaining dimension
is optimal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Relation
from ssl_runner.theory.dispatch import ExactTypeDispatch
from ssl_runner.theory.eigenspaces import (
    Groups,
    connected_components,
    find_groups,
    group_constant_space,
    leading_eigenspaces,
    to_sparse,
)
from ssl_runner.theory.matrices import (
    TIE_TOLERANCE,
    as_float64,
    centred,
    gram_singular_values,
    helmert,
    padded,
    tight_frame,
    unit_rows,
)
from ssl_runner.theory.selection import (
    Selection,
    assemble_embedding,
    drop_unused,
    repeat_values,
    rescale_eigenspaces,
    take_leading,
)

EXACT, UPPER, LOWER = "exact", "upper bound", "lower bound"
MAX_SIMPLEX_POINTS = 5000  # largest simplex whose vertices are computed


@dataclass
class Optimum:
    """Closed form of one loss on one relation, for K columns.

    form             name of the method
    kind             EXACT: `value` is the minimum; UPPER: an upper bound, attained by Z; LOWER: a lower bound
    value            loss at the optimum
    singular_values  (K,) of Z, descending, zero-padded; without Z, those of SpectralContrastive
    spaces           eigenspaces that contain Z's columns, and the number of dimensions used of each
    canonicalize     removes from Z (N, K) what the loss is invariant to (mean, row or column norms); float64
    build_embedding  builds Z (N, K); None if the bound has no embedding
    """

    form: str
    kind: str
    value: float
    singular_values: Tensor
    spaces: Selection
    canonicalize: Callable[[Tensor], Tensor]
    build_embedding: Callable[[], Tensor] | None

    @property
    def rank(self) -> int:
        """Number of singular values above 0."""
        return int((self.singular_values > 0).sum())

    @property
    def Z(self) -> Tensor | None:
        """Optimal embedding (N, K), float64; rotations of its columns or of tied eigenvectors are as good."""
        return self.build_embedding() if self.build_embedding else None


@ExactTypeDispatch
def optimum(loss: Loss, G: Relation, K: int) -> Optimum:
    """min over Z in R^(N x K) of loss(Z, G), for a relation G over N rows.

    Register the closed form of another loss with `@optimum.register`; a subclass does not inherit it. Raises
    NotImplementedError for a loss without one, and ValueError for K < 1, N < 2 or a G with a support set.
    """
    raise NotImplementedError(
        f"{type(loss).__name__} has no closed form: register one with @ssl_runner.theory.optimum.register"
    )


def check_rows(G: Relation, K: int) -> int:
    """Return N. Raises ValueError if there are no free embeddings Z (N, K) of at least two rows."""
    if K < 1:
        raise ValueError(f"K={K}: expected K >= 1; give the number of columns of Z")
    if G.num_rows < 2:
        raise ValueError(f"G has {G.num_rows} row: expected 2 or more; give a larger relation")
    if G.support is not None:
        raise ValueError("G has constant rows (a support set): expected free rows; set relation.queue=0")
    return G.num_rows


@optimum.register
def vicreg_optimum(loss: VICReg, G: Relation, K: int) -> Optimum:
    """Z* = sqrt(N-1) U diag(s), with U (N, K) the first eigenvectors of L orthogonal to 1.

    Exact for the squared variance if beta >= alpha: correlations then cost at least what they save. For the
    hinge, or beta < alpha, a rotation of the columns can have a lower loss.
    """
    N = check_rows(G, K)
    selection = take_leading(leading_eigenspaces(G, "laplacian", min(K, N - 1)), min(K, N - 1))
    values = repeat_values(selection)
    s = vicreg_scales(loss, values, N)
    zero = s.new_zeros(1)
    value = vicreg_value(loss, s, values, N) + (K - len(s)) * vicreg_value(loss, zero, zero, N)
    alpha, beta = loss.weights["variance"], loss.weights["covariance"]
    exact = (loss.variance == "squared" and beta >= alpha) or value <= 1e-12 * max(1, alpha) * K
    return Optimum(
        form="Laplacian eigenmaps",
        kind=EXACT if exact else UPPER,
        value=value,
        singular_values=padded(math.sqrt(N - 1) * s, K),
        spaces=drop_unused(selection, s > 0),
        canonicalize=centred,
        build_embedding=lambda: assemble_embedding(selection, math.sqrt(N - 1) * s, N, K),
    )


def vicreg_scales(loss: VICReg, values: Tensor, N: int) -> Tensor:
    """Standard deviations s (k,) of decorrelated columns that minimise VICReg, from eigenvalues (k,) of L.

    With c = gamma (N-1) lambda / (N alpha): s^2 = max(0, 1 - c) for the squared variance, and
    s^2 = max(0, min(1, 1/4c)^2 - eps) for the hinge.
    """
    alpha, gamma = loss.weights["variance"], loss.weights["invariance"]
    if alpha == 0:
        return torch.zeros_like(values)
    c = gamma * (N - 1) / (N * alpha) * values.clamp(min=0)
    s2 = 1 - c if loss.variance == "squared" else (0.25 / c).clamp(max=1).square() - loss.eps
    return torch.where(s2 > TIE_TOLERANCE, s2, 0.0).sqrt()


def vicreg_value(loss: VICReg, s: Tensor, values: Tensor, N: int) -> float:
    """VICReg of columns along eigenvectors of L, with standard deviations s (k,) and eigenvalues (k,)."""
    std = (s.square() + loss.eps).sqrt()
    variance = (1 - s.square()).square() if loss.variance == "squared" else (1 - std).relu()
    invariance = 2 * (N - 1) / N * values * s.square()
    return float((loss.weights["variance"] * variance + loss.weights["invariance"] * invariance).sum())


@optimum.register
def spectral_optimum(loss: SpectralContrastive, G: Relation, K: int) -> Optimum:
    """min |ZZ' - tG|_F^2: Z* = [w_k sqrt(max(t g_k, 0))], with (g_k, w_k) the leading eigenpairs of G.

    The rank of Z* is at most the number of positive eigenvalues.
    """
    N = check_rows(G, K)
    t = loss.target_scale(N, G.degrees.cpu().double().sum())
    dims = min(K, N - 1 if loss.center else N)
    selection = take_leading(leading_eigenspaces(G, "adjacency", dims, loss.center), dims)
    g = t * repeat_values(selection)
    g = torch.where(g > TIE_TOLERANCE * g.abs().max() if len(g) else g > 0, g, 0.0)
    removed = float(g.square().sum())
    return Optimum(
        form="multidimensional scaling",
        kind=EXACT,
        value=float(G.square_norm) - removed if loss.reduction == "sum" else -removed / N**2,
        singular_values=padded(g.sqrt(), K),
        spaces=drop_unused(selection, g > 0),
        canonicalize=centred if loss.center else as_float64,
        build_embedding=lambda: assemble_embedding(selection, g.sqrt(), N, K),
    )


@optimum.register
def simclr_optimum(loss: SimCLR, G: Relation, K: int) -> Optimum:
    """A regular simplex if G consists of M groups of one size m; otherwise a lower bound without embedding.

    Simplex: log(m - 1 + (N - m) exp(-(1 + 1/(M-1)) / tau)) per positive pair, attained iff K >= M - 1.
    Otherwise: the entropy of the rows of G, attained if each row's softmax equals the row of G. Rank and
    eigenspaces are then those of its squared surrogate, SpectralContrastive, scaled to unit rows.
    denominator="negatives" has no m - 1 in the first, and cosines of 1 and -1 in place of the second.
    """
    N = check_rows(G, K)
    loss.check_relation(G)
    total, decoupled = float(G.degrees.cpu().double().sum()), loss.denominator == "negatives"
    groups = find_groups(G)
    if groups is None or len(groups.sizes.unique()) > 1 or total == 0:
        surrogate = optimum(SpectralContrastive(), G, K)
        scale = math.sqrt(N) / max(float(surrogate.singular_values.norm()), 1e-300)
        value = decoupled_bound(groups, loss.tau) if decoupled and groups else row_entropy(G, groups)
        return Optimum(
            form="opposite negatives" if decoupled else "row entropy",
            kind=LOWER if total else EXACT,
            value=value / (total if loss.reduction == "mean" and total else 1),
            singular_values=scale * surrogate.singular_values,
            spaces=surrogate.spaces,
            canonicalize=unit_rows,
            build_embedding=None,
        )
    M, m = len(groups.sizes), int(groups.sizes[0])
    gap = (1 + 1 / (M - 1)) / loss.tau if M > 1 else math.inf  # s of positives - s of negatives
    per_pair = math.log(N - m) - gap if decoupled else math.log(m - 1 + (N - m) * math.exp(-gap))
    one = torch.ones(N, dtype=torch.float64)
    space = group_constant_space(1.0, groups.y, one, groups.sizes > 0, one if M > 1 else None)
    dims = min(K, max(M - 1, 1))

    def build_embedding() -> Tensor:
        if M > MAX_SIMPLEX_POINTS:
            raise ValueError(f"simplex of {M} points: expected at most {MAX_SIMPLEX_POINTS} to build Z")
        if M == 1:
            return F.pad(torch.ones(N, 1, dtype=torch.float64), (0, K - 1))
        vertices = helmert(torch.ones(M, dtype=torch.float64), M - 1) * math.sqrt(M / (M - 1))
        return padded(vertices[groups.y], K)

    return Optimum(
        form="simplex",
        kind=EXACT if K >= M - 1 else LOWER,
        value=per_pair * (1 if loss.reduction == "mean" else total),
        singular_values=padded(torch.full((dims,), math.sqrt(N / dims), dtype=torch.float64), K),
        spaces=[(space, dims)],
        canonicalize=(lambda Z: centred(unit_rows(Z))) if M > 1 else unit_rows,
        build_embedding=build_embedding if K >= M - 1 else None,
    )


def decoupled_bound(groups: Groups, tau: float) -> float:
    """sum_i d_i (log(N - m_i) - 2 / tau) over the rows i, each with m_i rows in its group."""
    negatives = (groups.sizes.sum() - groups.sizes).double()
    return float((groups.sizes * groups.degrees * (negatives.log() - 2 / tau)).sum())


def row_entropy(G: Relation, groups: Groups | None) -> float:
    """-sum_ij G_ij log(G_ij / d_i). For entries 0 or 1: sum_i d_i log d_i. groups: those of G, or None."""
    if groups:
        neighbors = (groups.sizes - 1).double().clamp(min=1)
        return float(torch.special.xlogy(groups.sizes * groups.degrees, neighbors).sum())
    d, weights = G.degrees.cpu().double(), G.weights()
    return float(torch.special.xlogy(d, d).sum() - torch.special.xlogy(weights, weights).sum())


@optimum.register
def barlow_optimum(loss: BarlowTwins, G: Relation, K: int) -> Optimum:
    """max tr(Z'GZ) subject to Z'DZ = I: Z* = D^-1/2 [w_1 ... w_K], C = diag(rho), loss sum_k (1 - rho_k)^2.

    If fewer than K eigenvalues rho of D^-1/2 G D^-1/2 are positive, each surplus column is zero and costs 1.
    If that is cheaper, all columns share the dimensions with rho > 0, or with rho = 1, as a tight frame F:
    C = F' diag(rho) F. An upper bound, exact only if all K rho are 1.
    """
    N = check_rows(G, K)
    d = G.degrees.cpu().double()
    dims = min(K, int((d > 0).sum()) - (1 if loss.center else 0))
    leading = take_leading(leading_eigenspaces(G, "normalized", dims, loss.center), dims)
    selection = [(space, q) for space, q in leading if space.value > TIE_TOLERANCE]
    unit = 1 / (1 + loss.eps)  # C_kk of a column with z'Gz = z'Dz = 1
    rho = repeat_values(selection)
    ones = int((rho > 1 - TIE_TOLERANCE).sum())
    frames = [torch.eye(len(rho), K, dtype=torch.float64)]
    if len(rho) < K:
        frames += [tight_frame(r, K) for r in {len(rho), ones} - {0}]
    values = [float(loss.total(loss.of_correlations(unit * M.T @ (rho[: len(M), None] * M)))) for M in frames]
    value, frame = min(zip(values, frames, strict=True), key=lambda pair: pair[0])
    r = len(frame)
    selection = take_leading([space for space, _ in selection], r)
    scale = torch.where(d > 0, d.clamp(min=1e-300).rsqrt(), 0)[:, None]

    def build_embedding() -> Tensor:
        return scale * assemble_embedding(selection, torch.ones(r, dtype=torch.float64), N, r) @ frame

    def canonicalize(Z: Tensor) -> Tensor:
        Z = as_float64(Z)
        if loss.center:
            Z = Z - d @ Z / d.sum().clamp(min=1e-300)
        Z = Z * (d > 0)[:, None]
        return Z / (d @ Z.square()).sqrt().clamp(min=1e-300)

    regular = bool((d == d[0]).all())
    gram = frame @ frame.T / d[0].clamp(min=1e-300) if regular else (Z := build_embedding()).T @ Z
    spaces = selection
    if not regular:
        components = connected_components(to_sparse(G))
        spaces = rescale_eigenspaces(selection, scale, components, d if loss.center else None)
    return Optimum(
        form="canonical correlation analysis",
        kind=EXACT if len(rho) == K and ones == K else UPPER,
        value=value,
        singular_values=padded(gram_singular_values(gram), K),
        spaces=spaces,
        canonicalize=canonicalize,
        build_embedding=build_embedding,
    )
