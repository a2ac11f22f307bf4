"""Optima of the losses for free embeddings, in float64.

Each loss is a function of (Z, G). Its optimum is a spectral embedding of G (Balestriero & LeCun 2022,
arXiv:2205.11508) by the K leading eigenvectors of

    VICReg, squared         L = D - G, orthogonal to 1, ascending    Laplacian eigenmaps (equal degrees)
    spectral contrastive    G, descending                            multidimensional scaling (centred G)
    Barlow Twins            D^-1/2 G D^-1/2, descending              canonical correlation analysis (views),
                                                                     linear discriminant analysis (labels)

The optimum uses the leading eigenspaces entirely; within the last one any subspace of the remaining dimension
is optimal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SpectralContrastive, VICReg
from ssl_runner.relation import Relation
from ssl_runner.theory.dispatch import ExactTypeDispatch
from ssl_runner.theory.eigenspaces import (
    connected_components,
    to_sparse,
)
from ssl_runner.theory.matrices import (
    HOST,
    TIE_TOLERANCE,
    as_float64,
    centred,
    gram_singular_values,
    padded,
    tight_frame,
)
from ssl_runner.theory.selection import (
    Selection,
    assemble_embedding,
    drop_unused,
    leading_selection,
    repeat_values,
    rescale_eigenspaces,
    take_leading,
)

EXACT, UPPER, LOWER, NUMERIC = "exact", "upper bound", "lower bound", "numeric"


@dataclass
class Optimum:
    """Closed form of one loss on one relation, for K columns.

    form             name of the method
    kind             EXACT: `value` is the minimum; UPPER: an upper bound, attained by Z; LOWER: a lower
                     bound; NUMERIC: the lowest value that an iteration found, attained by Z
    value            loss at the optimum
    singular_values  (K,) of Z, descending, zero-padded; None if they are not known
    spaces           eigenspaces that contain Z's columns, and the number of dimensions used of each; None if
                     they are not known
    canonicalize     removes from Z (N, K) what the loss is invariant to (mean, row or column norms); float64
    build_embedding  builds Z (N, K); None if the bound has no embedding
    """

    form: str
    kind: str
    value: float
    singular_values: Tensor | None
    spaces: Selection | None
    canonicalize: Callable[[Tensor], Tensor]
    build_embedding: Callable[[], Tensor] | None

    @property
    def rank(self) -> int | None:
        """Number of singular values above 0, None if they are not known."""
        return None if self.singular_values is None else int((self.singular_values > 0).sum())

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
    selection = leading_selection(G, "laplacian", min(K, N - 1))
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
    selection = leading_selection(G, "adjacency", dims, loss.center)
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
def barlow_optimum(loss: BarlowTwins, G: Relation, K: int) -> Optimum:
    """max tr(Z'GZ) subject to Z'DZ = I: Z* = D^-1/2 [w_1 ... w_K], C = diag(rho), loss sum_k (1 - rho_k)^2.

    If fewer than K eigenvalues rho of D^-1/2 G D^-1/2 are positive, each surplus column is zero and costs 1.
    If that is cheaper, all columns share the dimensions with rho > 0, or with rho = 1, as a tight frame F:
    C = F' diag(rho) F. An upper bound, exact only if all K rho are 1.
    """
    N = check_rows(G, K)
    d = G.degrees.cpu().double()
    dims = min(K, int((d > 0).sum()) - (1 if loss.center else 0))
    leading = leading_selection(G, "normalized", dims, loss.center)
    selection = [(space, q) for space, q in leading if space.value > TIE_TOLERANCE]
    unit = 1 / (1 + loss.eps)  # C_kk of a column with z'Gz = z'Dz = 1
    rho = repeat_values(selection)
    ones = int((rho > 1 - TIE_TOLERANCE).sum())
    frames = [torch.eye(len(rho), K, **HOST)]
    if len(rho) < K:
        frames += [tight_frame(r, K) for r in {len(rho), ones} - {0}]
    values = [float(loss.total(loss.of_correlations(unit * M.T @ (rho[: len(M), None] * M)))) for M in frames]
    value, frame = min(zip(values, frames, strict=True), key=lambda pair: pair[0])
    r = len(frame)
    selection = take_leading([space for space, _ in selection], r)
    scale = torch.where(d > 0, d.clamp(min=1e-300).rsqrt(), 0)[:, None]

    def build_embedding() -> Tensor:
        return scale * assemble_embedding(selection, torch.ones(r, **HOST), N, r) @ frame

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
