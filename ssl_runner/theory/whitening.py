"""Closed forms of the losses that whiten or ask for a Gaussian: W-MSE and SIGReg.

Both fix the covariance of Z to be I, exactly or by a penalty. With W'W = (N-1) I and W'1 = 0, the squared
distances of positives, tr(W'LW), are smallest for the first eigenvectors of the Laplacian L = D - G.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor

from ssl_runner.loss import WMSE, SIGReg
from ssl_runner.relation import Relation
from ssl_runner.theory.linear import (
    LinearOptimum,
    build_linear_optimum,
    check_linear_optimum,
    linear_optimum,
    smooth_directions,
    value_of,
)
from ssl_runner.theory.matrices import HOST, TIE_TOLERANCE, as_float64, centred, padded
from ssl_runner.theory.moments import CentredMoments
from ssl_runner.theory.optima import EXACT, LOWER, UPPER, Optimum, check_rows, optimum
from ssl_runner.theory.selection import assemble_embedding, leading_selection, repeat_values


@optimum.register
def wmse_optimum(loss: WMSE, G: Relation, K: int) -> Optimum:
    """Z* = sqrt(N-1) U, with U (N, K) the first eigenvectors of L orthogonal to 1.

    The value is 2 (N-1) / sum_ij G_ij times the sum of their eigenvalues; any invertible linear map of Z* is
    as good. Exact without blocks and unit rows. With unit rows the minimum is exactly 0 if that sum is 0.
    Otherwise 0 is a lower bound, without embedding or eigenspaces. Raises ValueError for too few rows, as the
    loss does.
    """
    N = check_rows(G, K)
    loss.check_rows(N, K, G.V)
    selection = leading_selection(G, "laplacian", K)
    total = max(float(G.degrees.cpu().double().sum()), 1.0)
    values = repeat_values(selection)
    values = torch.where(values > TIE_TOLERANCE * max(1.0, float(G.degrees.max())), values, 0.0)
    value = 2 * (N - 1) / total * float(values.sum())
    exact = loss.whitening_size is None and (not loss.unit_rows or value == 0)
    scales = torch.full((K,), math.sqrt(N - 1), **HOST)
    return Optimum(
        form="Laplacian eigenmaps",
        kind=EXACT if exact else LOWER,
        value=value if exact else 0.0,
        singular_values=scales if exact else None,
        spaces=selection if exact else None,
        canonicalize=whitened,
        build_embedding=(lambda: assemble_embedding(selection, scales, N, K)) if exact else None,
    )


def whitened(Z: Tensor) -> Tensor:
    """Orthogonal basis of the columns of Z (N, K), centred, with norms sqrt(N-1); 0 beyond their rank."""
    U, s, _ = torch.linalg.svd(centred(Z), full_matrices=False)
    rank = torch.finfo(Z.dtype).eps * max(Z.shape) * s[:1]
    return padded(U * (s > rank) * math.sqrt(len(Z) - 1), Z.shape[1])


@check_linear_optimum.register
def check_plain_wmse(loss: WMSE) -> None:
    """Only without blocks and unit rows is the loss a function of second moments."""
    if loss.unit_rows:
        raise NotImplementedError(
            "unit_rows=true: expected false, because WMSE with unit rows has no closed form for a linear"
            " model; set unit_rows=false"
        )
    if loss.whitening_size is not None:
        raise NotImplementedError(
            f"whitening_size={loss.whitening_size}: expected null, because WMSE with blocks has no closed"
            " form for a linear model; leave whitening_size out"
        )


@value_of.register
def wmse_value_of(loss: WMSE, Z: CentredMoments) -> float:
    """2 / sum_ij G_ij tr(C^-1 Z'LZ), with C = Z'HZ / (N-1), for the loss without blocks and unit rows."""
    check_linear_optimum(loss)
    L, failed = torch.linalg.cholesky_ex(Z.XHX / (Z.N - 1))
    if failed:
        raise ValueError(
            f"K={len(L)}: expected at most the rank of the features, so that Z can be whitened;"
            " use a smaller projector.K"
        )
    distances = torch.cholesky_solve(Z.XDX - Z.XGX, L).trace()
    return float(2 / max(Z.total, 1.0) * distances)


@linear_optimum.register
def wmse_linear_optimum(loss: WMSE, moments: CentredMoments, K: int, ridge: float = 0.0) -> LinearOptimum:
    """X'LX w = mu X'HX w, smallest mu, for the loss without blocks and unit rows."""
    check_linear_optimum(loss)
    mu, W = smooth_directions(moments, K, ridge)
    W = W * (moments.N - 1) ** 0.5
    kind = EXACT if ridge == 0 else UPPER
    return build_linear_optimum("locality preserving projections", loss, kind, moments, W, mu, K)


@optimum.register
def sigreg_optimum(loss: SIGReg, G: Relation, K: int) -> Optimum:
    """An upper bound: the better one of Z = 0 and sqrt(N) U, with U (N, K) the first eigenvectors of L.

    A covariance of I is what a Gaussian's second moments ask for; within an eigenspace, U is a random basis,
    whose columns are more nearly Gaussian than those of a sparse one. The value is that of one fixed set of
    directions, whatever the state of the loss. The loss is >= 0, and no better lower bound is known.
    """
    N = check_rows(G, K)
    selection = leading_selection(G, "laplacian", min(K, N - 1))
    generator = torch.Generator("cpu").manual_seed(0)
    loss = with_fixed_directions(loss)

    def build_embedding() -> Tensor:
        drawn = [space.project(torch.randn(N, q, generator=generator, **HOST)) for space, q in selection]
        mixed = torch.linalg.qr(torch.randn(K, K, generator=generator, **HOST))[0]
        return math.sqrt(N) * padded(torch.linalg.qr(torch.cat(drawn, 1))[0], K) @ mixed

    with torch.no_grad():
        Z = build_embedding().to(G.degrees.device)
        spread, collapsed = float(loss(Z, G)), float(loss(torch.zeros_like(Z), G))
    used = spread < collapsed
    Z = as_float64(Z) if used else torch.zeros(N, K, **HOST)
    return Optimum(
        form="Laplacian eigenmaps",
        kind=UPPER,
        value=min(spread, collapsed),
        singular_values=padded(torch.full((min(K, N - 1),), used * math.sqrt(N), **HOST), K),
        spaces=selection if used else [],
        canonicalize=centred,
        build_embedding=lambda: Z,
    )


def with_fixed_directions(loss: SIGReg) -> SIGReg:
    """A copy of the loss in eval mode, with the same directions for every state of the loss."""
    loss = deepcopy(loss).eval()
    loss.counter.state.fill_(1)
    return loss
