"""The gamma at which the optimum of a loss stops to use a direction of Z."""

import math

import torch
from torch import Tensor

from ssl_runner.loss import Loss, VICReg
from ssl_runner.relation import Labels, Relation, Views
from ssl_runner.relation.builders import FromLabels, FromViews, RelationBuilder
from ssl_runner.theory.dispatch import ExactTypeDispatch
from ssl_runner.theory.eigenspaces import leading_eigenspaces
from ssl_runner.theory.matrices import TIE_TOLERANCE
from ssl_runner.theory.optima import check_rows
from ssl_runner.theory.selection import repeat_values, take_leading


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
    values = repeat_values(take_leading(leading_eigenspaces(G, "laplacian", min(K, N - 1)), min(K, N - 1)))
    factor = 1.0 if loss.variance == "squared" else 1 / (4 * math.sqrt(loss.eps))
    of_direction = factor * loss.weights["variance"] * N / (N - 1) / values.clamp(min=TIE_TOLERANCE)
    return torch.where(values > TIE_TOLERANCE, of_direction, torch.inf)


def expected_relation(builder: RelationBuilder, V: int, batch_size: int, labels: Tensor) -> Relation | None:
    """The relation of a batch of `batch_size` images, V views each, if it does not depend on the embeddings.

    `labels` (n,) are those of all images; the batch has the same shares of the classes, rounded. None for
    other relations than views and the labels of the data set.
    """
    if type(builder) is FromViews:
        return Views(batch_size, V, builder.normalized)
    if type(builder) is FromLabels and builder.path is None:
        ranks = torch.linspace(0, len(labels) - 1, batch_size, dtype=torch.float64).round().long()
        return Labels(labels.cpu().sort().values[ranks].repeat(V), normalized=builder.normalized)
    return None


def describe_gamma(loss: Loss, G: Relation | None, K: int) -> str | None:
    """One line: the gamma from which the optimum on G drops directions, or a warning if it is exceeded.

    None for a loss without thresholds, or for a relation that is not known.
    """
    if G is None or not thresholds.registered(type(loss)):
        return None
    gamma, of_direction = loss.weights["invariance"], thresholds(loss, G, K)
    form = f"{getattr(loss, 'variance', '')}, batch of {G.num_rows} rows".removeprefix(", ")
    first = float(of_direction.min())
    if math.isinf(first):
        return f"gamma={gamma:g}: the optimum uses all {len(of_direction)} directions for any gamma ({form})"
    used = int((of_direction > gamma).sum())
    if used == len(of_direction):
        return f"gamma={gamma:g}: the optimum uses all {used} directions up to gamma={first:.4g} ({form})"
    return (
        f"warning: gamma={gamma:g} is beyond {first:.4g}, where the optimum drops directions: it uses {used}"
        f" of {len(of_direction)} ({form}); lower gamma or raise alpha to keep them"
    )
