"""Closed-form optima that are tight frames: those of MMCR and FroSSL, whose terms depend on unit rows.

M unit vectors f_g in K dimensions are a tight frame if sum_g f_g f_g' = (M / K) I, and exist for every M >= K
(Benedetto & Fickus 2003). For M <= K the counterpart is an orthonormal set.
"""

import math

import torch
from torch import Tensor

from ssl_runner.loss import MMCR, FroSSL
from ssl_runner.relation import Relation, Views
from ssl_runner.theory.eigenspaces import Groups, find_groups, group_constant_space, zero_sum_space
from ssl_runner.theory.matrices import HOST, gram_singular_values, normalised, padded, tight_frame
from ssl_runner.theory.optima import EXACT, LOWER, Optimum, check_rows, optimum
from ssl_runner.theory.selection import Selection


@optimum.register
def mmcr_optimum(loss: MMCR, G: Relation, K: int) -> Optimum:
    """-sqrt(M min(M, K)) + alpha/M sum_g sqrt(m_g), for M groups of m_g rows: exact.

    |C|_* <= sqrt(rank(C)) |C|_F, and a centroid has length 1 at most: |C|_F <= sqrt(M). |Z_g|_* >= |Z_g|_F =
    sqrt(m_g). All are equalities if the rows of a group are equal and the centroids are a tight frame
    (M >= K) or orthonormal (M <= K).
    """
    check_rows(G, K)
    loss.check_relation(G)
    groups = find_groups(G)
    assert groups is not None
    M = len(groups.sizes)
    value = -math.sqrt(M * min(M, K))
    if loss.alpha:
        value += loss.alpha * float(groups.sizes.double().sqrt().mean())
    return frame_optimum(value, groups, K)


@optimum.register
def frossl_optimum(loss: FroSSL, G: Relation, K: int) -> Optimum:
    """The lower bound -log min(K, n), with n the rows of a statistic; exact or higher if G has equal groups.

    A Gram matrix of trace 1 and rank r has a squared norm of at least 1/r. For M groups of m rows and degree
    d, the mean of all Gram matrices U U'/N that permute rows within groups, and groups, has the same
    invariance and no larger norm. Its least norm is at cosine rho within groups and 0 between them, so

        min over rho in [0, 1] of max(-log K, log((1 + (m-1) rho^2) / N)) + 2 gamma d (1 - rho)

    is a lower bound. It is attained for K <= M, with rho = 1 and a tight frame, and for K >= N. With
    `per_view`, -log min(K, n) is attained on `Views` for any K.
    """
    N = check_rows(G, K)
    loss.check_relation(G)
    groups = find_groups(G)
    n = N // G.V if loss.per_view and G.V else N
    if type(G) is Views and groups is not None and loss.per_view:
        return frame_optimum(-math.log(min(K, n)), groups, K)
    if groups is None or loss.per_view or len(groups.sizes.unique()) > 1:
        return lower_bound(-math.log(min(K, n)))
    M, m, degree = len(groups.sizes), int(groups.sizes[0]), float(groups.degrees[0])
    if K <= M:
        return frame_optimum(-math.log(K), groups, K)
    rho, value = best_cosine(loss.gamma * degree, N, m, K)
    if K < N:
        return lower_bound(value)
    one = torch.ones(N, **HOST)
    spaces: Selection = [(group_constant_space(0.0, groups.y, one, groups.sizes > 0), M)]
    values = [math.sqrt(1 + (m - 1) * rho)] * M
    if rho < 1:
        spaces.append((zero_sum_space(1.0, groups, groups.sizes > 0), N - M))
        values += [math.sqrt(1 - rho)] * (N - M)

    def build_embedding() -> Tensor:
        same = (groups.y[:, None] == groups.y).double() / m
        root = math.sqrt(1 - rho) * torch.eye(N, **HOST)
        return padded(root + (math.sqrt(1 + (m - 1) * rho) - math.sqrt(1 - rho)) * same, K)

    return Optimum(
        form="equal cosines within groups",
        kind=EXACT,
        value=value,
        singular_values=padded(torch.tensor(values, **HOST), K),
        spaces=spaces,
        canonicalize=normalised,
        build_embedding=build_embedding,
    )


def best_cosine(pull: float, N: int, m: int, K: int) -> tuple[float, float]:
    """The rho that minimises max(-log K, log((1 + (m-1) rho^2) / N)) + 2 pull (1 - rho), and the minimum.

    Where the first argument is the larger one the sum decreases in rho. Otherwise its derivative is 0 at the
    roots of pull (1 + (m-1) rho^2) = (m-1) rho, of which the smaller one is a minimum.
    """
    if m == 1:
        return 1.0, max(-math.log(K), -math.log(N))
    start = min(1.0, math.sqrt(max(0.0, N / K - 1) / (m - 1)))
    roots = [0.0] if pull == 0 else []
    if pull > 0 and (square := 1 - 4 * pull**2 / (m - 1)) >= 0:
        roots = [2 * pull / ((m - 1) * (1 + math.sqrt(square)))]

    def value(rho: float) -> float:
        return max(-math.log(K), math.log((1 + (m - 1) * rho**2) / N)) + 2 * pull * (1 - rho)

    rho = min([start, 1.0, *(min(max(root, start), 1.0) for root in roots)], key=value)
    return rho, value(rho)


def frame_optimum(value: float, groups: Groups, K: int) -> Optimum:
    """The optimum whose rows are a tight frame F (K, M) of the groups, or orthonormal for M <= K."""
    N, M = len(groups.y), len(groups.sizes)
    dims, sizes = min(M, K), groups.sizes.double()
    one = torch.ones(N, **HOST)

    def frame() -> Tensor:
        return tight_frame(K, M) if M > K else torch.eye(M, **HOST)  # (dims, M)

    if bool((sizes == sizes[0]).all()):
        singular_values = torch.full((dims,), math.sqrt(N / dims), **HOST)
    else:
        F = frame()
        singular_values = gram_singular_values(F * sizes @ F.T)
    return Optimum(
        form="tight frame",
        kind=EXACT,
        value=value,
        singular_values=padded(singular_values, K),
        spaces=[(group_constant_space(1.0, groups.y, one, groups.sizes > 0), dims)],
        canonicalize=normalised,
        build_embedding=lambda: padded(frame().T[groups.y], K),
    )


def lower_bound(value: float) -> Optimum:
    """A lower bound without embedding."""
    return Optimum(
        form="flat spectrum",
        kind=LOWER,
        value=value,
        singular_values=None,
        spaces=None,
        canonicalize=normalised,
        build_embedding=None,
    )
