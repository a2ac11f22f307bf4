"""A selection of eigenspaces: the leading ones entirely, and a number of dimensions of the last one."""

import numpy as np
import torch
from torch import Tensor

from ssl_runner.relation import Relation
from ssl_runner.theory.eigenspaces import (
    Eigenspace,
    explicit_space,
    group_constant_space,
    leading_eigenspaces,
)
from ssl_runner.theory.matrices import HOST, TIE_TOLERANCE, padded

Selection = list[tuple[Eigenspace, int]]  # eigenspaces, and the number of dimensions used of each


def leading_selection(G: Relation, matrix: str, k: int, center: bool = False) -> Selection:
    """Select the k leading dimensions of a matrix of G (`leading_eigenspaces`), or all if there are fewer."""
    return take_leading(leading_eigenspaces(G, matrix, k, center), k)


def take_leading(spaces: list[Eigenspace], k: int) -> Selection:
    """Select the first k dimensions of a list of eigenspaces, or all if there are fewer."""
    selection = []
    for space in spaces:
        if k <= 0:
            break
        selection.append((space, min(space.dim, k)))
        k -= space.dim
    return selection


def repeat_values(selection: Selection) -> Tensor:
    """Eigenvalue of each selected dimension: (k,) float64."""
    return torch.tensor([space.value for space, q in selection for _ in range(q)], **HOST)


def drop_unused(selection: Selection, used: Tensor) -> Selection:
    """Drop eigenspaces whose dimensions are not used. used (k,) is boolean and constant within a space."""
    starts = np.cumsum([0, *(q for _, q in selection)])
    return [pair for pair, start in zip(selection, starts, strict=False) if used[start]]


def assemble_embedding(selection: Selection, scales: Tensor, N: int, K: int) -> Tensor:
    """Basis vectors of the selected dimensions times scales (k,), zero-padded to K columns: (N, K)."""
    vectors = [space.basis(q) for space, q in selection] or [torch.zeros(N, 0, **HOST)]
    return padded(torch.cat(vectors, 1) * scales, K)


def rescale_eigenspaces(
    selection: Selection, scale: Tensor, y: Tensor, orthogonal: Tensor | None
) -> Selection:
    """Images of eigenspaces of D^-1/2 G D^-1/2 under D^-1/2 = diag(scale), scale (N, 1).

    Each image is made orthogonal to the images before it. That of eigenvalue 1 consists of the vectors that
    are constant on each connected component y (N,).
    """
    result: Selection = []
    for space, q in selection:
        if space.value > 1 - TIE_TOLERANCE:
            one, joined = torch.ones_like(scale[:, 0]), torch.bincount(y) > 1
            result.append((group_constant_space(1.0, y, one, joined, orthogonal), q))
            continue
        vectors = scale * space.basis(space.dim)
        for earlier, _ in result:
            vectors = vectors - earlier.project(vectors)
        result.append((explicit_space(space.value, torch.linalg.qr(vectors)[0].numpy()), q))
    return result
