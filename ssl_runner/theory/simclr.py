"""The optimum of SimCLR: a regular simplex for equal groups, otherwise found by iteration."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss import SimCLR
from ssl_runner.relation import Relation
from ssl_runner.theory import infonce
from ssl_runner.theory.eigenspaces import Groups, explicit_space, find_groups, group_constant_space, to_sparse
from ssl_runner.theory.matrices import HOST, centred, helmert, normalised, padded
from ssl_runner.theory.optima import EXACT, LOWER, NUMERIC, Optimum, check_rows, optimum

MAX_SIMPLEX_POINTS = 5000  # largest simplex whose vertices are computed


@optimum.register
def simclr_optimum(loss: SimCLR, G: Relation, K: int) -> Optimum:
    """A regular simplex if G consists of M groups of one size m; otherwise L-BFGS or a lower bound.

    Simplex: log(m - 1 + (N - m) exp(-(1 + 1/(M-1)) / tau)) per positive pair, attained iff K >= M - 1;
    without m - 1 for denominator="negatives". Otherwise, up to `infonce.MAX_ROWS` rows: the minimum that
    L-BFGS finds. For more rows: the entropy of the rows of G, a lower bound attained if each row's softmax
    equals the row of G; for denominator="negatives" that of `decoupled_bound`. Their rank is not known.
    """
    N = check_rows(G, K)
    loss.check_relation(G)
    total, decoupled = float(G.degrees.cpu().double().sum()), loss.denominator == "negatives"
    groups = find_groups(G)
    if groups is not None and total and len(groups.sizes.unique()) == 1:
        return simplex(loss, groups, K, scale=1 if loss.reduction == "mean" else total)
    scale = 1 / total if loss.reduction == "mean" and total else 1.0
    if total and N <= infonce.MAX_ROWS and not decoupled:
        return numeric_optimum(loss, G, K, scale)
    value = decoupled_bound(G, loss.tau) if decoupled else row_entropy(G, groups)
    return Optimum(
        form="opposite negatives" if decoupled else "row entropy",
        kind=LOWER if total else EXACT,
        value=scale * value,
        singular_values=None,
        spaces=None,
        canonicalize=normalised,
        build_embedding=None,
    )


def simplex(loss: SimCLR, groups: Groups, K: int, scale: float) -> Optimum:
    """The optimum for M groups of one size m. `scale` times the mean over positive pairs is the value."""
    N, M, m = len(groups.y), len(groups.sizes), int(groups.sizes[0])
    gap = (1 + 1 / (M - 1)) / loss.tau if M > 1 else math.inf  # s of positives - s of negatives
    if loss.denominator == "negatives":
        per_pair = math.log(N - m) - gap
    else:
        per_pair = math.log(m - 1 + (N - m) * math.exp(-gap))
    one = torch.ones(N, **HOST)
    space = group_constant_space(1.0, groups.y, one, groups.sizes > 0, one if M > 1 else None)
    dims = min(K, max(M - 1, 1))

    def build_embedding() -> Tensor:
        if M > MAX_SIMPLEX_POINTS:
            raise ValueError(f"simplex of {M} points: expected at most {MAX_SIMPLEX_POINTS} to build Z")
        if M == 1:
            return F.pad(torch.ones(N, 1, **HOST), (0, K - 1))
        vertices = helmert(torch.ones(M, **HOST), M - 1) * math.sqrt(M / (M - 1))
        return padded(vertices[groups.y], K)

    return Optimum(
        form="simplex",
        kind=EXACT if K >= M - 1 else LOWER,
        value=scale * per_pair,
        singular_values=padded(torch.full((dims,), math.sqrt(N / dims), **HOST), K),
        spaces=[(space, dims)],
        canonicalize=(lambda Z: centred(normalised(Z))) if M > 1 else normalised,
        build_embedding=build_embedding if K >= M - 1 else None,
    )


def numeric_optimum(loss: SimCLR, G: Relation, K: int, scale: float) -> Optimum:
    """The minimum that `infonce_minimum` finds. `scale` times the sum over positive pairs is the value."""
    found = infonce.infonce_minimum(to_sparse(G).toarray(), loss.tau, K)
    U, values, _ = np.linalg.svd(found.Z, full_matrices=False)
    r = int(np.linalg.matrix_rank(found.Z))
    return Optimum(
        form="free embeddings by L-BFGS",
        kind=NUMERIC,
        value=scale * found.value,
        singular_values=padded(torch.from_numpy(values[:r]), K),
        spaces=[(explicit_space(1.0, U[:, :r]), r)],
        canonicalize=normalised,
        build_embedding=lambda: torch.from_numpy(found.Z),
    )


def decoupled_bound(G: Relation, tau: float) -> float:
    """sum_i d_i (log(N - m_i) - 2 / tau) over the rows i, each with m_i rows in its group, any weights."""
    assert G.groups is not None
    y, d = G.groups.cpu(), G.degrees.cpu().double()
    negatives = (len(y) - y.bincount()[y]).double()
    return float((d * (negatives.log() - 2 / tau)).sum())


def row_entropy(G: Relation, groups: Groups | None) -> float:
    """-sum_ij G_ij log(G_ij / d_i). For entries 0 or 1: sum_i d_i log d_i. groups: those of G, or None."""
    if groups:
        neighbors = (groups.sizes - 1).double().clamp(min=1)
        return float(torch.special.xlogy(groups.sizes * groups.degrees, neighbors).sum())
    d, weights = G.degrees.cpu().double(), G.weights()
    return float(torch.special.xlogy(d, d).sum() - torch.special.xlogy(weights, weights).sum())
