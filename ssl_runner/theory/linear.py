"""Closed-form optima of the losses for a linear model Z = X W + b, from D x D moments in float64.

X (N, D) may be pixels or any fixed features. With X centred (Balestriero & LeCun 2022, arXiv:2205.11508):

    VICReg, squared         X'LX w = mu X'HX w, smallest mu     locality preserving projections
    spectral contrastive    X'GX w = g X'HX w, largest g        linear multidimensional scaling
    Barlow Twins            X'GX w = rho X'DX w, largest rho    CCA (views), LDA (labels); W'X'DXW = I
"""

from dataclasses import dataclass

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.loss.base import off_diagonal
from ssl_runner.theory.dispatch import ExactTypeDispatch
from ssl_runner.theory.matrices import HOST, gram_singular_values, padded
from ssl_runner.theory.moments import CentredMoments
from ssl_runner.theory.optima import EXACT, UPPER, vicreg_scales

MIN_VARIANCE_RATIO = 1e-10  # standardised directions below this share of the largest variance are dropped
MIN_STD_RATIO = 1e-10  # columns below this share of the largest standard deviation count as constant
NO_CLOSED_FORM = (
    "{} has no closed form for a linear model: register one with @ssl_runner.theory.linear_optimum.register"
)


@ExactTypeDispatch
def value_of(loss: Loss, Z: CentredMoments) -> float:
    """The loss of all N rows of Z, from their K x K moments.

    Register another loss with `@value_of.register`; a subclass does not inherit it. Raises
    NotImplementedError for a loss that is not registered.
    """
    raise NotImplementedError(
        f"{type(loss).__name__} is not known as a function of second moments: register it with"
        " @ssl_runner.theory.value_of.register"
    )


@value_of.register
def vicreg_value_of(loss: VICReg, Z: CentredMoments) -> float:
    """C = Z'HZ / (N - 1); invariance 2/N tr(Z'LZ) with Z'LZ = Z'DZ - Z'GZ."""
    C = Z.XHX / (Z.N - 1)
    s2 = C.diagonal().clamp(min=0)
    variance = (1 - s2).square() if loss.variance == "squared" else (1 - (s2 + loss.eps).sqrt()).relu()
    terms = {
        "variance": variance.sum(),
        "covariance": off_diagonal(C).square().sum(),
        "invariance": 2 / Z.N * (Z.XDX - Z.XGX).trace(),
    }
    return float(loss.total(terms))


@value_of.register
def spectral_value_of(loss: SpectralContrastive, Z: CentredMoments) -> float:
    """|Z'Z|_F^2 and tr(Z'GZ), of centred Z if the loss centres."""
    Z = Z if loss.center else Z.about_zero()
    total, square_norm = (torch.tensor(scalar, **HOST) for scalar in (Z.total, Z.square_norm))
    return float(loss.total(loss.of_products(Z.XHX, Z.XGX.trace(), Z.N, total, square_norm)))


@value_of.register
def barlow_value_of(loss: BarlowTwins, Z: CentredMoments) -> float:
    """C_kl = (Z'GZ)_kl / (n_k n_l + eps), with n_k^2 = (Z'DZ)_kk."""
    Z = Z.about_weighted_mean() if loss.center else Z.about_zero()
    n = Z.XDX.diagonal().clamp(min=0).sqrt()
    return float(loss.total(loss.of_correlations(Z.XGX / (n[:, None] * n + loss.eps))))


@dataclass
class LinearOptimum:
    """Closed form of one loss on the moments of X: Z = X W + bias.

    form             name of the method
    loss             loss that `value` refers to: the given one, or its surrogate
    kind             EXACT: no W and bias have a lower value; UPPER: an upper bound of the minimum
    W, bias          (D, K) and (K,)
    value            loss at W and bias, over all N rows at once
    eigenvalues      (K,) mu, g or rho of each column, nan beyond the number of directions
    singular_values  (K,) of Z, centred
    """

    form: str
    loss: Loss
    kind: str
    W: Tensor
    bias: Tensor
    value: float
    eigenvalues: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """Rank of Z, centred."""
        return int((self.singular_values > 0).sum())


@ExactTypeDispatch
def linear_optimum(loss: Loss, moments: CentredMoments, K: int, ridge: float = 0.0) -> LinearOptimum:
    """min over W (D, K) and bias (K,) of loss(X W + bias, G), from the moments of X (N, D).

    `ridge` penalises every direction by this share of the mean variance, so that directions of little
    variance are not selected; the result is then an upper bound. Directions with almost no variance
    (MIN_VARIANCE_RATIO) are dropped. Register the closed form of another loss with
    `@linear_optimum.register`; a subclass does not inherit it. Raises NotImplementedError for a loss without
    one, and ValueError if X is constant.
    """
    raise NotImplementedError(NO_CLOSED_FORM.format(type(loss).__name__))


@ExactTypeDispatch
def check_linear_optimum(loss: Loss) -> None:
    """Raise NotImplementedError if `linear_optimum` has no closed form for the loss and its options.

    Register a function for a loss with `@check_linear_optimum.register` if that depends on its options.
    """
    if not linear_optimum.registered(type(loss)):
        raise NotImplementedError(NO_CLOSED_FORM.format(type(loss).__name__))


@linear_optimum.register
def vicreg_linear_optimum(loss: VICReg, moments: CentredMoments, K: int, ridge: float = 0.0) -> LinearOptimum:
    """X'LX w = mu X'HX w, smallest mu; columns scaled as for free embeddings (`vicreg_scales`)."""
    mu, W = smooth_directions(moments, K, ridge)
    W = W * ((moments.N - 1) ** 0.5 * vicreg_scales(loss, mu, moments.N))
    exact = loss.variance == "squared" and loss.weights["covariance"] >= loss.weights["variance"]
    kind = EXACT if exact and ridge == 0 else UPPER
    return build_linear_optimum("locality preserving projections", loss, kind, moments, W, mu, K)


@linear_optimum.register
def spectral_linear_optimum(
    loss: SpectralContrastive, moments: CentredMoments, K: int, ridge: float = 0.0
) -> LinearOptimum:
    """t X'GX w = g X'HX w, largest g; columns scaled by sqrt(max(g, 0)).

    With center=False, X gets a constant column, whose weight is the bias.
    """
    X = moments if loss.center else moments.with_constant()
    t = loss.target_scale(X.N, torch.tensor(X.total, **HOST))
    g, W = eigenpairs(t * X.XGX, X.XHX, K, ridge)
    W = W * g.clamp(min=0).sqrt()
    kind = EXACT if ridge == 0 else UPPER
    return build_linear_optimum("linear multidimensional scaling", loss, kind, moments, W, g, K)


@linear_optimum.register
def simclr_linear_optimum(loss: SimCLR, moments: CentredMoments, K: int, ridge: float = 0.0) -> LinearOptimum:
    """Optimum of the squared surrogate, SpectralContrastive, on centred Z."""
    return linear_optimum(SpectralContrastive(loss.reduction, center=True), moments, K, ridge)


@linear_optimum.register
def barlow_linear_optimum(
    loss: BarlowTwins, moments: CentredMoments, K: int, ridge: float = 0.0
) -> LinearOptimum:
    """X'GX w = rho X'DX w, largest rho, on centred X. An upper bound.

    Columns with rho <= 0 are set to zero: each would cost more than a zero column.
    """
    X = moments.about_weighted_mean() if loss.center else moments
    rho, W = eigenpairs(X.XGX, X.XDX, K, ridge)
    W = W * (rho > 0).to(rho)
    return build_linear_optimum("canonical correlation analysis", loss, UPPER, moments, W, rho, K)


def build_linear_optimum(
    form: str, loss: Loss, kind: str, moments: CentredMoments, W: Tensor, eigenvalues: Tensor, K: int
) -> LinearOptimum:
    """Complete a closed form for the moments of X (N, D).

    W (D, k) maps centred X to centred Z; the mean of Z is 0, or the last row of a W (D + 1, k). W is
    zero-padded to K columns, and eigenvalues (k,) are padded with nan. The value is computed by `value_of`.
    """
    D = len(moments.mean)
    W = padded(W, K)
    W, mean = W[:D], W[D:].sum(0)
    return LinearOptimum(
        form=form,
        loss=loss,
        kind=kind,
        W=W,
        bias=mean - moments.mean @ W,
        value=value_of(loss, moments.transform(W, mean)),
        eigenvalues=F.pad(eigenvalues, (0, K - len(eigenvalues)), value=torch.nan),
        singular_values=padded(gram_singular_values(W.T @ moments.XHX @ W), K),
    )


def smooth_directions(moments: CentredMoments, K: int, ridge: float) -> tuple[Tensor, Tensor]:
    """K eigenpairs of X'LX w = mu X'HX w of smallest mu: mu (k,), and w (D, k) with w'X'HXw = 1.

    The ridge is added to X'LX: on the smaller side of the ratio it makes directions of little variance look
    worse. On X'HX it would make them look best, with mu = 0. mu stays w'X'LXw.
    """
    A, B = moments.XDX - moments.XGX, moments.XHX
    if not ridge:
        return eigenpairs(A, B, K, smallest=True)
    penalty = ridge * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype, device=B.device)
    _, W = eigenpairs(A + penalty, B, K, smallest=True)
    return ((A @ W) * W).sum(0), W


def eigenpairs(
    A: Tensor, B: Tensor, K: int, ridge: float = 0.0, smallest: bool = False
) -> tuple[Tensor, Tensor]:
    """K leading eigenpairs of A w = mu (B + ridge tr(B)/D I) w within the range of B, for A, B (D, D).

    Returns mu (k,) and w (D, k) with k <= K, and w'Bw = 1 for ridge = 0. The entry of largest magnitude of
    each w is positive. Columns are first scaled to unit variance, because dropping directions must not depend
    on units. Raises ValueError if B = 0.
    """
    varying = B.diagonal() > MIN_STD_RATIO**2 * B.diagonal().max()
    if not varying.any():
        raise ValueError("all features are constant: expected features that vary; use another backbone")
    scale = B.diagonal()[varying].rsqrt()
    ridges = ridge * B.trace() / len(B) * scale.square()
    A, B = (scale[:, None] * M[varying][:, varying] * scale for M in (A, B))
    values, vectors = scipy.linalg.eigh(B.numpy(), driver="evd")
    values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    kept = values > MIN_VARIANCE_RATIO * values.max()
    T = vectors[:, kept] / values[kept].sqrt()
    if ridge:
        L = torch.linalg.cholesky(torch.eye(T.shape[1], **HOST) + T.T @ (ridges[:, None] * T))
        T = torch.linalg.solve_triangular(L, T.T, upper=False).T
    K = min(K, T.shape[1])
    # not "evr", which computes subsets but can fail on high multiplicities
    mu, u = scipy.linalg.eigh((T.T @ A @ T).numpy(), driver="evd")
    chosen = slice(K) if smallest else slice(-1, -K - 1, -1)
    W = A.new_zeros(len(varying), K)
    W[varying] = scale[:, None] * (T @ torch.from_numpy(u[:, chosen].copy()))
    W = W * W.gather(0, W.abs().argmax(0, keepdim=True)).sign()
    return torch.from_numpy(mu[chosen].copy()), W
