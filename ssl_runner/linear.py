"""The linear regime, Z = (X - mean) W: the closed-form W of each loss from D x D moments, in float64 (Balestriero & LeCun 2022).

    VICReg (squared)     X'LX w = mu X'HX w, smallest mu     Locality Preserving Projections
    SimCLR (squared)     X'GX w = g X'HX w, largest g        linear multidimensional scaling
    Barlow Twins         X'GX w = rho X'DX w, largest rho    CCA (views), LDA (labels); under W'X'DXW = I

with X centred. X may be pixels or any fixed features. The moments are sums over batches: nothing of size N x D is kept.
"""

from dataclasses import dataclass
from functools import singledispatch

import scipy.linalg
import torch
from torch import Tensor

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.loss.base import off_diagonal
from ssl_runner.relation import Relation, Views
from ssl_runner.theory import EXACT, UPPER, padded, vicreg_scales

NEGLIGIBLE = 1e-8  # directions with less than this share of the largest variance hold nothing but roundings


class Moments:
    """Sums over the rows x of X (N, D) and a relation over them, on X's device. A batch is either added with its own relation
    (pairs lie within batches) or, for labels, by its classes, whose pairs reach over all batches.

    class_sizes (C,): rows of each class in all batches together, for `add_classes`; normalized: whether G divides by n_c - 1.
    """

    def __init__(self, D: int, device: torch.device, class_sizes: Tensor | None = None, normalized: bool = False):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.N = 0
        self.shift: Tensor | None = None  # near the mean, so that float32 products lose nothing to it
        self.X, self.XD = (torch.zeros(D, dtype=dtype, device=device) for _ in range(2))
        self.XX, self.XGX, self.XDX = (torch.zeros(D, D, dtype=dtype, device=device) for _ in range(3))
        self.total = torch.zeros((), dtype=dtype, device=device)  # sum_ij G_ij
        self.square_norm = torch.zeros_like(self.total)  # sum_ij G_ij^2
        if class_sizes is not None:
            positives = (class_sizes - 1).clamp(min=0).to(self.X)
            self.degrees = positives.clamp(max=1) if normalized else positives
            self.weights = 1 / positives.clamp(min=1) if normalized else torch.ones_like(positives)
            self.sums = torch.zeros(len(class_sizes), D, dtype=dtype, device=device)

    def add(self, X: Tensor, G: Relation) -> None:
        """X (n, D) with a relation over these rows."""
        X = self._start(X)
        XX, d = X.T @ X, G.degrees.to(X)
        self.XX += XX
        if isinstance(G, Views):  # X'GX = S'S - X'X with S the sums over views
            S = X.view(G.V, G.n, -1).sum(0)
            self.XGX += G.weight * (S.T @ S - XX)
            self.XDX += G.weight * (G.V - 1) * XX
        else:
            self.XGX += X.T @ (G @ X)
            self.XDX += X.T @ (d[:, None] * X)
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += G.square_norm

    def add_classes(self, X: Tensor, y: Tensor) -> None:
        """X (n, D) with labels y (n,): a positive of every other row of its class, in this batch and all others."""
        X = self._start(X)
        d, w = self.degrees[y].to(X), self.weights[y].to(X)
        self.XX += X.T @ X
        self.XGX -= X.T @ (w[:, None] * X)
        self.XDX += X.T @ (d[:, None] * X)
        self.sums.index_add_(0, y, X.to(self.sums))
        self.XD += d @ X
        self.total += d.sum()
        self.square_norm += (d * w).sum()

    def _start(self, X: Tensor) -> Tensor:
        X = X.detach().float() if self.XX.dtype == torch.float32 or X.dtype != torch.float64 else X.detach()
        if self.shift is None:
            self.shift = X.mean(0)
        X = X - self.shift
        self.N += len(X)
        self.X += X.sum(0)
        return X

    def centred(self) -> "Centred":
        """The moments of X - mean, on the host in float64."""
        if self.shift is None:
            raise ValueError("no batch has been added to these moments")
        XGX = self.XGX + self.sums.T @ (self.weights[:, None] * self.sums) if hasattr(self, "sums") else self.XGX
        mean = self.X / self.N
        cross = torch.outer(self.XD, mean)
        shifted = self.total * torch.outer(mean, mean) - cross - cross.T
        XX = self.XX - self.N * torch.outer(mean, mean)
        XHX, XGX, XDX = (M.cpu().double() for M in (XX, XGX + shifted, self.XDX + shifted))
        mean = (mean + self.shift).cpu().double()
        return Centred(self.N, mean, XHX, XGX, XDX, float(self.total), float(self.square_norm))


@dataclass
class Centred:
    """Moments of centred X (N, D): mean (D,); XHX, XGX, XDX (D, D); total = sum_ij G_ij; square_norm = sum_ij G_ij^2."""

    N: int
    mean: Tensor
    XHX: Tensor
    XGX: Tensor
    XDX: Tensor
    total: float
    square_norm: float

    def value(self, loss: Loss, W: Tensor) -> float:
        """The loss of Z = (X - mean) W over all N rows at once, W (D, K)."""
        ZHZ, ZGZ, ZDZ = (W.T @ M @ W for M in (self.XHX, self.XGX, self.XDX))
        return value_of(loss, ZHZ, ZGZ, ZDZ, self)


@singledispatch
def value_of(loss: Loss, ZHZ: Tensor, ZGZ: Tensor, ZDZ: Tensor, moments: Centred) -> float:
    """A loss from the K x K moments of Z, centred. Raises NotImplementedError for a loss that is not a function of them."""
    raise NotImplementedError(f"{type(loss).__name__} is not a function of second moments: it has no closed linear form")


@value_of.register
def _(loss: VICReg, ZHZ: Tensor, ZGZ: Tensor, ZDZ: Tensor, moments: Centred) -> float:
    C = ZHZ / (moments.N - 1)
    s2 = C.diagonal().clamp(min=0)
    variance = (1 - s2).square() if loss.variance == "squared" else (1 - (s2 + loss.eps).sqrt()).relu()
    terms = {
        "variance": variance.sum(),
        "covariance": off_diagonal(C).square().sum(),
        "invariance": 2 / moments.N * (ZDZ - ZGZ).trace(),
    }
    return float(loss.total(terms))


@value_of.register
def _(loss: SquaredSimCLR, ZHZ: Tensor, ZGZ: Tensor, ZDZ: Tensor, moments: Centred) -> float:
    total, square_norm = (torch.tensor(scalar, dtype=torch.float64) for scalar in (moments.total, moments.square_norm))
    return float(loss.total(loss.of_products(ZHZ, ZGZ, moments.N, total, square_norm)))


@value_of.register
def _(loss: BarlowTwins, ZHZ: Tensor, ZGZ: Tensor, ZDZ: Tensor, moments: Centred) -> float:
    n = ZDZ.diagonal().clamp(min=0).sqrt()
    C = ZGZ / (n[:, None] * n + loss.eps)
    return float(loss.total({"diagonal": (C.diagonal() - 1).square().sum(), "off_diagonal": off_diagonal(C).square().sum()}))


@dataclass
class LinearOptimum:
    """The closed-form W (D, K) of one loss on some moments.

    form             the method that it is
    loss             whose value is meant: the loss itself, or its squared surrogate
    kind             whether no W has a lower value, or `value` is only an upper bound of the lowest
    value            of the loss at W, over all N rows at once
    eigenvalues      (K,) mu, g or rho of each column, nan where there is no direction left
    singular_values  (K,) of Z = (X - mean) W
    """

    form: str
    loss: Loss
    kind: str
    W: Tensor
    value: float
    eigenvalues: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of Z that are not 0."""
        return int((self.singular_values > 0).sum())


def optimum(loss: Loss, moments: Centred, K: int, ridge: float = 0.0) -> LinearOptimum:
    """The W (D, K) that minimises the loss. `ridge` adds that share of the mean variance to each direction's: with it, or where
    the form is only an upper bound, `kind` says so. Directions without variance are left out. SimCLR is given by its squared
    surrogate. Raises NotImplementedError for a loss without a closed form."""
    if isinstance(loss, SimCLR):
        return optimum(SquaredSimCLR(loss.reduction), moments, K, ridge)
    if isinstance(loss, VICReg):
        mu, W = leading(moments.XDX - moments.XGX, moments.XHX, K, ridge, smallest=True)
        scales = (moments.N - 1) ** 0.5 * vicreg_scales(loss, mu, moments.N)
        exact = loss.variance == "squared" and loss.weights["covariance"] >= loss.weights["variance"]
        form, eigenvalues = "locality preserving projections", mu
    elif isinstance(loss, SquaredSimCLR):
        t = loss.target_scale(moments.N, torch.tensor(moments.total))
        g, W = leading(t * moments.XGX, moments.XHX, K, ridge)
        scales, exact = g.clamp(min=0).sqrt(), True
        form, eigenvalues = "linear multidimensional scaling", g
    elif isinstance(loss, BarlowTwins):
        rho, W = leading(moments.XGX, moments.XDX, K, ridge)
        scales, exact = torch.ones_like(rho), False
        form, eigenvalues = "canonical correlation analysis", rho
    else:
        raise NotImplementedError(
            f"{type(loss).__name__} has no closed linear form (vicreg, simclr, simclr_squared, barlow have)"
        )
    W = torch.nn.functional.pad(W * scales, (0, K - W.shape[1]))
    variances = (W.T @ moments.XHX @ W).diagonal().clamp(min=0)
    return LinearOptimum(
        form=form,
        loss=loss,
        kind=EXACT if exact and ridge == 0 else UPPER,
        W=W,
        value=moments.value(loss, W),
        eigenvalues=torch.nn.functional.pad(eigenvalues, (0, K - len(eigenvalues)), value=torch.nan),
        singular_values=padded(variances.sqrt(), K),
    )


def leading(A: Tensor, B: Tensor, K: int, ridge: float, smallest: bool = False) -> tuple[Tensor, Tensor]:
    """The K leading eigenpairs of A w = mu (B + ridge tr(B)/D I) w within the range of B: mu (k,), w (D, k) with w'Bw = 1
    (up to the ridge), k <= K. Each w's largest entry is positive."""
    values, vectors = scipy.linalg.eigh(B.numpy(), driver="evd")
    values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    kept = values > NEGLIGIBLE * values.max()
    T = vectors[:, kept] / (values[kept] + ridge * B.trace() / len(B)).sqrt()
    K = min(K, T.shape[1])
    mu, u = scipy.linalg.eigh((T.T @ A @ T).numpy(), driver="evd")  # "evr", which takes subsets, can fail on high multiplicities
    chosen = slice(K) if smallest else slice(-1, -K - 1, -1)
    W = T @ torch.from_numpy(u[:, chosen].copy())
    W = W * W.gather(0, W.abs().argmax(0, keepdim=True)).sign()
    return torch.from_numpy(mu[chosen].copy()), W
