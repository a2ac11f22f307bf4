"""The minimum of InfoNCE over free unit rows, by L-BFGS, for relations whose optimum is not known.

With S = ZZ' / tau, the loss is a convex function of S,

    f(S) = sum_i d_i log sum_{k != i} exp(S_ik) - sum_ij G_ij S_ij,    S >= 0,  S_ii = 1 / tau,  rank S <= K.

Without the bound on the rank the problem is convex. Any feasible S gives a lower bound of its minimum: with
the gradient M of f at S, less the diagonal for which diag(M S) = 0,

    min f >= f(S) + lambda_min(M) N / tau.

If K exceeds the rank of the minimum, L-BFGS on Z reaches it from almost every start (Burer & Monteiro 2005).
Otherwise the best of several starts is returned, and the bound does not apply to rank K.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from scipy.special import logsumexp

MAX_ROWS = 600  # the matrices are N x N
STARTS, FEW_ROWS, MORE_STARTS = 4, 100, 20  # if the lower bound is not attained; for up to FEW_ROWS rows
TIGHT = 1e-4  # distance from the lower bound, relative to the loss, that counts as attained
OPTIONS = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-9, "maxcor": 20}
SMALL = 0.01  # singular values below this share of the largest are set to 0: they vanish as it converges


@dataclass
class Minimum:
    """Z (N, K) with unit rows, its value f, and the lower bound of f for any number of columns."""

    Z: np.ndarray
    value: float
    bound: float

    @property
    def attained(self) -> bool:
        """Whether the value is the minimum over any number of columns, to relative accuracy TIGHT."""
        return self.value - self.bound <= TIGHT * abs(self.value)


def infonce_minimum(G: np.ndarray, tau: float, K: int) -> Minimum:
    """Minimise f for G (N, N), symmetric, entries >= 0, diagonal 0.

    First in 2 sqrt(2 N) columns: sqrt(2 N) in general suffice for the minimum without a bound on the rank.
    If it is not attained, in min(K, N) columns with several seeded starts. Returns the best.
    """
    best = descend(G, tau, min(K, math.ceil(2 * math.sqrt(2 * len(G)))), seed=0)
    for seed in range(1, MORE_STARTS if len(G) <= FEW_ROWS else STARTS):
        if best.attained:
            break
        best = min(best, descend(G, tau, min(K, len(G)), seed), key=lambda found: found.value)
    best.Z = np.pad(best.Z, ((0, 0), (0, K - best.Z.shape[1])))
    return best


def descend(G: np.ndarray, tau: float, K: int, seed: int) -> Minimum:
    """L-BFGS from a random start, without the directions that vanish."""
    N, d = len(G), G.sum(1)
    scale = 1 / max(d.sum(), 1.0)  # the tolerances of SciPy are absolute

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        X = flat.reshape(N, K)
        norms = np.linalg.norm(X, axis=1, keepdims=True)
        Z = X / norms
        value, A = of_similarities(Z @ Z.T / tau, G, d)
        dZ = A @ Z * (2 / tau)
        dX = (dZ - (dZ * Z).sum(1, keepdims=True) * Z) / norms
        return scale * value, scale * dX.ravel()

    start = np.random.default_rng(seed).standard_normal(N * K)
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=OPTIONS)
    U, values, V = np.linalg.svd(unit_vectors(found.x.reshape(N, K)), full_matrices=False)
    Z = unit_vectors(U @ np.diag(values * (values > SMALL * values[0])) @ V)
    value, A = of_similarities(Z @ Z.T / tau, G, d)
    M = A - np.diag((A @ Z * Z).sum(1))
    return Minimum(Z, value, value + min(0.0, float(np.linalg.eigvalsh(M)[0])) * N / tau)


def unit_vectors(X: np.ndarray) -> np.ndarray:
    """X (N, K) with rows of norm 1. No row may be 0."""
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def of_similarities(S: np.ndarray, G: np.ndarray, d: np.ndarray) -> tuple[float, np.ndarray]:
    """f(S) and its symmetric gradient A (N, N). Overwrites the diagonal of S."""
    value = -(G * S).sum()
    np.fill_diagonal(S, -np.inf)
    logs = logsumexp(S, axis=1)
    value += d @ logs
    P = d[:, None] * np.exp(S - logs[:, None])
    return float(value), (P + P.T) / 2 - G
