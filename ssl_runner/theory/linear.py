"""The linear regime, Z = (X - mean) W: the closed-form W of each loss from D x D moments, in float64 (Balestriero & LeCun 2022).

    VICReg (squared)     X'LX w = mu X'HX w, smallest mu     Locality Preserving Projections
    SimCLR (squared)     X'GX w = g X'HX w, largest g        linear multidimensional scaling
    Barlow Twins         X'GX w = rho X'DX w, largest rho    CCA (views), LDA (labels); under W'X'DXW = I

with X centred. X may be pixels or any fixed features. The moments are sums over batches: nothing of size N x D is kept.
"""

from dataclasses import dataclass, replace
from functools import singledispatch

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.loss.base import off_diagonal
from ssl_runner.relation import Relation, Views
from ssl_runner.theory.eigenspaces import helmert
from ssl_runner.theory.optima import EXACT, UPPER, gram_singular_values, padded, vicreg_scales

NEGLIGIBLE = 1e-10  # directions of the standardised columns with less than this share of the largest variance are left out
CONSTANT = 1e-10  # columns with less than this share of the largest deviation are constant


class Moments:
    """Sums over the rows x of X (N, D) and a relation over them, on X's device in float64 (float32 on MPS, which has no other). A
    batch is either added with its own relation (pairs lie within batches) or, for labels, by its classes, whose pairs reach over
    all batches.

    class_sizes (C,): rows of each class in all batches together, for `add_classes`; normalized: whether G divides by n_c - 1.
    """

    def __init__(
        self, D: int, device: torch.device, class_sizes: Tensor | None = None, normalized: bool = False
    ):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.N = 0
        self.shift: Tensor | None = None  # near the mean, so that the products lose nothing to it
        self.X, self.XD = (torch.zeros(D, dtype=dtype, device=device) for _ in range(2))
        self.XX, self.XGX, self.XDX = (torch.zeros(D, D, dtype=dtype, device=device) for _ in range(3))
        self.total = torch.zeros((), dtype=dtype, device=device)  # sum_ij G_ij
        self.square_norm = torch.zeros_like(self.total)  # sum_ij G_ij^2
        self.sums: Tensor | None = None  # of each class (C, D)
        if class_sizes is not None:
            positives = (class_sizes - 1).clamp(min=0).to(self.X)
            self.degrees = positives.clamp(max=1) if normalized else positives
            self.weights = 1 / positives.clamp(min=1) if normalized else torch.ones_like(positives)
            self.sums = torch.zeros(len(class_sizes), D, dtype=dtype, device=device)

    def add(self, X: Tensor, G: Relation) -> None:
        """X (n, D) with a relation over these rows."""
        X = self._start(X)
        d = G.degrees.to(X)
        if isinstance(G, Views):  # G has the eigenvalue V - 1 on the views' mean, and -1 on their contrasts
            ones = torch.ones(G.V, dtype=torch.float64)
            contrasts = torch.cat([ones[:, None] / G.V**0.5, helmert(ones, G.V - 1)], 1).to(X)
            Y = torch.einsum("vw,vnd->wnd", contrasts, X.view(G.V, G.n, -1))
            mean, rest = Y[0].T @ Y[0], Y[1:].flatten(0, 1).T @ Y[1:].flatten(0, 1)
            XX = mean + rest
            self.XX += XX
            self.XGX += G.weight * ((G.V - 1) * mean - rest)
            self.XDX += G.weight * (G.V - 1) * XX
        else:
            self.XX += X.T @ X
            self.XGX += X.T @ (G @ X)
            self.XDX += X.T @ (d[:, None] * X)
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += G.square_norm

    def add_classes(self, X: Tensor, y: Tensor) -> None:
        """X (n, D) with labels y (n,): a positive of every other row of its class, in this batch and all others."""
        if self.sums is None:
            raise ValueError("these moments were not given the classes' sizes")
        X = self._start(X)
        d, w = self.degrees[y], self.weights[y]
        self.XX += X.T @ X
        self.XGX -= X.T @ (w[:, None] * X)
        self.XDX += X.T @ (d[:, None] * X)
        self.sums.index_add_(0, y, X)
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += (d * w).sum()

    def _start(self, X: Tensor) -> Tensor:
        X = X.detach().to(self.X.dtype)
        if self.shift is None:
            self.shift = X.mean(0)
        X = X - self.shift
        self.N += len(X)
        self.X += X.sum(0)
        return X

    def centred(self) -> "CentredMoments":
        """The moments of X - mean, on the host in float64."""
        if self.shift is None:
            raise ValueError("no batch has been added to these moments")
        XGX = self.XGX if self.sums is None else self.XGX + self.sums.T @ (self.weights[:, None] * self.sums)
        mean = self.X / self.N
        cross = torch.outer(self.XD, mean)
        shifted = self.total * torch.outer(mean, mean) - cross - cross.T
        XX = self.XX - self.N * torch.outer(mean, mean)
        XHX, XGX, XDX, XD, mean = (
            M.cpu().double()
            for M in (XX, XGX + shifted, self.XDX + shifted, self.XD - self.total * mean, mean + self.shift)
        )
        return CentredMoments(self.N, mean, XHX, XGX, XDX, XD, float(self.total), float(self.square_norm))


@dataclass
class CentredMoments:
    """Moments of X (N, D) about its mean (D,): XHX, XGX, XDX (D, D); XD (D,) = sum_i d_i x_i; total = sum_ij G_ij; square_norm =
    sum_ij G_ij^2."""

    N: int
    mean: Tensor
    XHX: Tensor
    XGX: Tensor
    XDX: Tensor
    XD: Tensor
    total: float
    square_norm: float

    def of(self, W: Tensor, mean: Tensor | None = None) -> "CentredMoments":
        """The moments of Z = (X - mean of X) W + mean, W (D, K)."""
        mean = W.new_zeros(W.shape[1]) if mean is None else mean
        ZHZ, ZGZ, ZDZ = (W.T @ M @ W for M in (self.XHX, self.XGX, self.XDX))
        return replace(self, mean=mean, XHX=ZHZ, XGX=ZGZ, XDX=ZDZ, XD=W.T @ self.XD)

    def about_zero(self) -> "CentredMoments":
        """The same sums without the mean taken off."""
        cross = torch.outer(self.XD, self.mean)
        square = torch.outer(self.mean, self.mean)
        shifted = self.total * square + cross + cross.T
        XD = self.XD + self.total * self.mean
        return replace(
            self, XHX=self.XHX + self.N * square, XGX=self.XGX + shifted, XDX=self.XDX + shifted, XD=XD
        )

    def about_weighted_mean(self) -> "CentredMoments":
        """The same sums about the mean by degrees, sum_i d_i x_i / total."""
        shifted = torch.outer(self.XD, self.XD) / (self.total or 1.0)
        return replace(self, XGX=self.XGX - shifted, XDX=self.XDX - shifted, XD=torch.zeros_like(self.XD))

    def with_constant(self) -> "CentredMoments":
        """The moments with a column of ones at the end, which is not centred: a bias among the weights."""
        edge = self.XD[:, None]

        def bordered(M: Tensor, side: Tensor, corner: float) -> Tensor:
            return torch.cat(
                [torch.cat([M, side], 1), torch.cat([side.T, torch.full((1, 1), corner, dtype=M.dtype)], 1)]
            )

        return replace(
            self,
            mean=F.pad(self.mean, (0, 1)),
            XHX=bordered(self.XHX, torch.zeros_like(edge), self.N),
            XGX=bordered(self.XGX, edge, self.total),
            XDX=bordered(self.XDX, edge, self.total),
            XD=F.pad(self.XD, (0, 1), value=self.total),
        )

    def value(self, loss: Loss, W: Tensor, mean: Tensor | None = None) -> float:
        """The loss of Z = (X - mean of X) W + mean over all N rows at once. Raises NotImplementedError for a loss that is not a
        function of second moments."""
        return value_of(loss, self.of(W, mean))


@singledispatch
def value_of(loss: Loss, Z: CentredMoments) -> float:
    """A loss from the K x K moments of Z."""
    raise NotImplementedError(
        f"{type(loss).__name__} is not a function of second moments: it has no closed linear form"
    )


@value_of.register
def _(loss: VICReg, Z: CentredMoments) -> float:
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
def _(loss: SpectralContrastive, Z: CentredMoments) -> float:
    Z = Z if loss.center else Z.about_zero()
    total, square_norm = (torch.tensor(scalar, dtype=torch.float64) for scalar in (Z.total, Z.square_norm))
    return float(loss.total(loss.of_products(Z.XHX, Z.XGX, Z.N, total, square_norm)))


@value_of.register
def _(loss: BarlowTwins, Z: CentredMoments) -> float:
    Z = Z.about_weighted_mean() if loss.center else Z.about_zero()
    n = Z.XDX.diagonal().clamp(min=0).sqrt()
    return float(loss.total(loss.of_correlations(Z.XGX / (n[:, None] * n + loss.eps))))


@dataclass
class LinearOptimum:
    """The closed form of one loss on some moments: Z = X W + bias, W (D, K), bias (K,).

    form             the method that it is
    loss             whose value is meant: the loss itself, or its squared surrogate
    kind             whether no W and bias have a lower value, or `value` is only an upper bound of the lowest
    value            of the loss at W, over all N rows at once
    eigenvalues      (K,) mu, g or rho of each column, nan where there is no direction left
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
        """The rank of Z, centred."""
        return int((self.singular_values > 0).sum())


def has_linear_optimum(loss: Loss) -> bool:
    """Whether `optimum` has a closed linear form for the loss."""
    return isinstance(loss, VICReg | SimCLR | SpectralContrastive | BarlowTwins)


def linear_optimum(loss: Loss, moments: CentredMoments, K: int, ridge: float = 0.0) -> LinearOptimum:
    """The W (D, K) that minimises the loss. `ridge` adds that share of the mean variance to each direction's: with it, or where
    the form is only an upper bound, `kind` says so. Directions with next to no variance (NEGLIGIBLE) are left out. SimCLR is
    given by its squared surrogate on centred Z; Barlow Twins on centred X, without columns of rho <= 0, each of which would cost
    more than a column of zeros. Raises NotImplementedError for a loss without a closed form, ValueError where X is constant."""
    if isinstance(loss, SimCLR):
        return linear_optimum(SpectralContrastive(loss.reduction, center=True), moments, K, ridge)
    X = moments
    if isinstance(loss, VICReg):
        mu, W = eigenpairs(X.XDX - X.XGX, X.XHX, K, ridge, smallest=True)
        scales = (X.N - 1) ** 0.5 * vicreg_scales(loss, mu, X.N)
        exact = loss.variance == "squared" and loss.weights["covariance"] >= loss.weights["variance"]
        form, eigenvalues = "locality preserving projections", mu
    elif isinstance(loss, SpectralContrastive):
        X = X if loss.center else X.with_constant()
        t = loss.target_scale(X.N, torch.tensor(X.total))
        g, W = eigenpairs(t * X.XGX, X.XHX, K, ridge)
        scales, exact = g.clamp(min=0).sqrt(), True
        form, eigenvalues = "linear multidimensional scaling", g
    elif isinstance(loss, BarlowTwins):
        X = X.about_weighted_mean() if loss.center else X
        rho, W = eigenpairs(X.XGX, X.XDX, K, ridge)
        scales, exact = (rho > 0).to(rho), False
        form, eigenvalues = "canonical correlation analysis", rho
    else:
        raise NotImplementedError(f"{type(loss).__name__} has no closed linear form")
    W = padded(W * scales, K)
    W, mean = W[: len(moments.mean)], W[len(moments.mean) :].sum(0)
    return LinearOptimum(
        form=form,
        loss=loss,
        kind=EXACT if exact and ridge == 0 else UPPER,
        W=W,
        bias=mean - moments.mean @ W,
        value=moments.value(loss, W, mean),
        eigenvalues=F.pad(eigenvalues, (0, K - len(eigenvalues)), value=torch.nan),
        singular_values=padded(gram_singular_values(W.T @ moments.XHX @ W), K),
    )


def eigenpairs(A: Tensor, B: Tensor, K: int, ridge: float, smallest: bool = False) -> tuple[Tensor, Tensor]:
    """The K leading eigenpairs of A w = mu (B + ridge tr(B)/D I) w within the range of B: mu (k,), w (D, k) with w'Bw = 1
    (up to the ridge), k <= K. Each w's largest entry is positive. The columns are brought to one variance first, so that units do
    not decide what is negligible."""
    alive = B.diagonal() > CONSTANT**2 * B.diagonal().max()
    if not alive.any():
        raise ValueError("all features are the same on every row: there is nothing to fit")
    scale = B.diagonal()[alive].rsqrt()
    ridges = ridge * B.trace() / len(B) * scale.square()
    A, B = (scale[:, None] * M[alive][:, alive] * scale for M in (A, B))
    values, vectors = scipy.linalg.eigh(B.numpy(), driver="evd")
    values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    kept = values > NEGLIGIBLE * values.max()
    T = vectors[:, kept] / values[kept].sqrt()
    if ridge:
        L = torch.linalg.cholesky(torch.eye(T.shape[1]).to(T) + T.T @ (ridges[:, None] * T))
        T = torch.linalg.solve_triangular(L, T.T, upper=False).T
    K = min(K, T.shape[1])
    mu, u = scipy.linalg.eigh(
        (T.T @ A @ T).numpy(), driver="evd"
    )  # "evr", which takes subsets, can fail on high multiplicities
    chosen = slice(K) if smallest else slice(-1, -K - 1, -1)
    W = A.new_zeros(len(alive), K)
    W[alive] = scale[:, None] * (T @ torch.from_numpy(u[:, chosen].copy()))
    W = W * W.gather(0, W.abs().argmax(0, keepdim=True)).sign()
    return torch.from_numpy(mu[chosen].copy()), W
