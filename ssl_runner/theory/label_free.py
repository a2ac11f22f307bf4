"""Measures of an embedding that need no labels, from the principal axes of its centred rows."""

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-7  # added to each share of the entropy, as in RankMe
# of LiDAR. Its authors give no value; public implementations have 1e-6 to 1e-3.
DELTA = 1e-4
RANKS = slice(3, 100)  # of the fit of alpha-ReQ: the 4th to 100th eigenvalue, as in its authors' fastssl


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of values (r,) > 0, normalised to sum 1 (plus 1e-7). Of singular values: RankMe."""
    if not len(values):
        return 0.0
    p = values / values.sum() + EPSILON
    return float((-(p * p.log()).sum()).exp())


def lidar(U: Tensor, values: Tensor, V: int) -> float:
    """Effective rank of the eigenvalues of S_w^-1/2 S_b S_w^-1/2 (LiDAR, Thilak et al., arXiv:2312.04000).

    U (N, r) and values (r,) are the left singular vectors and singular values of the centred embedding, whose
    rows are V views of N / V images, view-major. S_b is the covariance of the images' means, and S_w the mean
    covariance of the views of an image plus DELTA I.

    In the coordinates U diag(values), T = S_b + S_w is diagonal. The eigenvalues are theta / (1 - theta),
    with theta those of T^-1/2 S_b T^-1/2.
    """
    n, T = len(U) // V, values.square() / len(U) + DELTA
    B = (U * values).view(V, n, -1).mean(0) / (n * T).sqrt()  # (n, r)
    theta = torch.linalg.eigvalsh(B @ B.T if n < B.shape[1] else B.T @ B)
    theta = theta[theta > torch.finfo(theta.dtype).eps * len(theta)].clamp(max=1 - 1e-15)
    return effective_rank(theta / (1 - theta))


def alpha_req(values: Tensor) -> float | None:
    """Exponent a of eigenvalues ~ rank^-a of the covariance (alpha-ReQ, Agrawal et al. 2022).

    values (r,): singular values of the centred embedding, descending. The slope is fitted by least squares in
    log-log scale over RANKS, weighted by 1 / rank. None with fewer than two eigenvalues there.
    """
    ranks = np.arange(1, len(values) + 1)[RANKS]
    if len(ranks) < 2:
        return None
    logs = 2 * values.log().numpy()[RANKS]
    return -float(np.polyfit(np.log(ranks), logs, 1, w=ranks**-0.5)[0])


def off_diagonal_shares(Z: Tensor) -> tuple[float, float]:
    """Shares of |Z'Z|_F^2 = |ZZ'|_F^2 off the diagonal of Z'Z and of ZZ', of centred Z (N, K) in float64.

    The non-contrastive and the contrastive criterion of Garrido et al. 2022 (arXiv:2206.02574):

        |offdiag Z'Z|^2 + sum_k |z_.k|^4 = |offdiag ZZ'|^2 + sum_i |z_i.|^4
    """
    squares = Z.square()
    total = float((Z @ Z.T if len(Z) < Z.shape[1] else Z.T @ Z).square().sum())
    columns, rows = (float(squares.sum(axis).square().sum()) for axis in (0, 1))
    return (1 - columns / total, 1 - rows / total) if total else (0.0, 0.0)
