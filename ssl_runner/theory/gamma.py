"""The gamma at which the optimum of a loss stops to use a direction of Z."""

import math

import torch
from torch import Tensor

from ssl_runner.loss import Loss, VICReg
from ssl_runner.relation import Labels, Relation, Views
from ssl_runner.relation.builders import FromLabels, FromViews, RelationBuilder
from ssl_runner.theory.dispatch import ExactTypeDispatch
from ssl_runner.theory.matrices import TIE_TOLERANCE
from ssl_runner.theory.optima import check_rows
from ssl_runner.theory.selection import leading_selection, repeat_values


@ExactTypeDispatch
def thresholds(loss: Loss, G: Relation, K: int) -> Tensor:
    """The gamma at which the optimum of `loss` on G drops each direction: (min(K, N - 1),), descending.

    For gamma below entry r, the optimum in K columns has more than r directions. The gamma of `loss` is not
    used. An entry is inf for a direction that is used for every gamma. Register another loss with
    `@thresholds.register`. Raises NotImplementedError for a loss that is not registered, and ValueError as
    `optimum` does.
    """
    raise NotImplementedError(
        f"{type(loss).__name__} has no known thresholds: register them with"
        " @ssl_runner.theory.thresholds.register"
    )


@thresholds.register
def vicreg_thresholds(loss: VICReg, G: Relation, K: int) -> Tensor:
    """alpha N / ((N-1) lambda_r), with lambda_r the eigenvalues of L orthogonal to 1.

    For the hinge 1/(4 sqrt eps) times that. See `optima.vicreg_scales`.
    """
    N = check_rows(G, K)
    values = repeat_values(leading_selection(G, "laplacian", min(K, N - 1)))
    alpha = loss.weights["variance"]
    if alpha == 0:
        return torch.zeros_like(values)
    of_direction = alpha * N / (N - 1) / torch.where(values > TIE_TOLERANCE, values, 0)  # inf for 0
    if loss.variance == "hinge":
        of_direction /= 4 * values.new_tensor(loss.eps).sqrt()  # inf for eps = 0
    return of_direction


def expected_relation(builder: RelationBuilder, V: int, batch_size: int, labels: Tensor) -> Relation | None:
    """The relation of a batch of `batch_size` images, V views each, if it does not depend on the embeddings.

    `labels` (n,) are those of all images; the batch has the same shares of the classes, rounded. None for
    other relations than views and the labels of the data set. It covers the rows of all ranks: call it within
    `distributed.local_only`.
    """
    if type(builder) is FromViews:
        return Views(batch_size, V, builder.normalized, "cpu")
    if type(builder) is FromLabels and builder.path is None:
        images = torch.arange(batch_size, device="cpu")
        middles = (2 * images + 1) * len(labels) // (2 * batch_size)  # of equal shares
        return Labels(labels.cpu().sort().values[middles].repeat(V), normalized=builder.normalized)
    return None


def gamma_limits(loss: Loss, G: Relation | None, K: int) -> dict[str, float | None] | None:
    """How gamma bounds the directions of the optimum on G, for run.json.

    gamma        that of the loss
    first_drop   the gamma from which the optimum drops directions, None if there is no such gamma
    directions   those of the optimum below first_drop, min(K, N - 1)
    used         those of the optimum at the gamma of the loss
    any_gamma    those that are used for every gamma; for views, at most n - 1
    rows         rows of G

    None for a loss without thresholds, or for a relation that is not known.
    """
    if G is None or not thresholds.registered(type(loss)):
        return None
    of_direction = thresholds(loss, G, K)
    first = float(of_direction.min())
    return {
        "gamma": loss.weights["invariance"],
        "first_drop": None if math.isinf(first) else first,
        "directions": len(of_direction),
        "used": int((of_direction > loss.weights["invariance"]).sum()),
        "any_gamma": int(of_direction.isinf().sum()),
        "rows": G.num_rows,
    }


def describe_gamma(limits: dict[str, float | None] | None) -> str | None:
    """One line on `gamma_limits`, which is a warning if gamma is beyond the first drop."""
    if limits is None:
        return None
    gamma, first, directions, used = (limits[key] for key in ("gamma", "first_drop", "directions", "used"))
    batch = f"(batch of {limits['rows']} rows)"
    if first is None:
        return f"gamma={gamma:g}: the optimum uses all {directions} directions for any gamma {batch}"
    if used == directions:
        return (
            f"gamma={gamma:g}: the optimum uses all {used} directions up to gamma={first:.4g}, and"
            f" {limits['any_gamma']} for any gamma {batch}"
        )
    return (
        f"warning: gamma={gamma:g} is beyond {first:.4g}, where the optimum drops directions: it uses {used}"
        f" of {directions} {batch}; lower gamma or raise alpha to keep them"
    )
