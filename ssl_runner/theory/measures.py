"""TODO theory.measures"""

import torch
from torch import Tensor

from ssl_runner.theory.optima import Optimum, Selection, as_float64, centred

# What a relation's spectrum says of embeddings and labels


def alignment(Z: Tensor, best: Optimum) -> float:
    """The mean squared cosine of the principal angles between the left singular space of what the loss sees of Z (N, K), and the
    nearest of the closed form's spaces: in [0, 1], about dim / N at random."""
    U = left_singular_space(best.canonicalize(Z))
    angles = min(U.shape[1], sum(q for _, q in best.spaces))
    return projected_energy(U, best.spaces)[0] / angles if angles else 0.0


def label_energy_of_optimum(Y: Tensor, best: Optimum) -> tuple[float, float]:
    """One-hot targets Y (N, C) -> |U'Yc|^2 / |Yc|^2 with U the closed form's eigenvectors: the share of label energy that a
    network trained to the optimum on G shows to a linear probe. The most over what is tied, and the mean."""
    Yc = centred(Y)
    total = float(Yc.square().sum())
    most, mean = projected_energy(Yc, best.spaces)
    return (most / total, mean / total) if total else (0.0, 0.0)


def label_energy(Z: Tensor, Y: Tensor) -> float:
    """Embedding Z (N, K), one-hot targets Y (N, C) -> |U'Yc|^2 / |Yc|^2 with U the left singular space of Z, centred: the share
    of the targets' variance that a linear map with an intercept explains on these very rows, about rank / N at random."""
    U, Yc = left_singular_space(centred(Z)), centred(Y)
    total = float(Yc.square().sum())
    return float((U.T @ Yc).square().sum()) / total if total else 0.0


def projected_energy(U: Tensor, spaces: Selection) -> tuple[float, float]:
    """|P U|_F^2 for U (N, r) and the projector P onto the spaces: where only q of a space's dimensions are taken, for the best q
    and for the mean over all choices."""
    most = mean = 0.0
    for space, q in spaces:
        part = U.T @ space.project(U)
        whole = float(part.trace())
        most += (
            whole
            if q >= min(space.dim, len(part))
            else float(torch.linalg.eigvalsh(part)[-q:].clamp(min=0).sum())
        )
        mean += whole * q / space.dim
    return most, mean


def singular_values(Z: Tensor) -> Tensor:
    """Those of Z (N, K) that are not 0 up to roundings: (r,) float64, descending, r the numerical rank. By the smaller Gram
    matrix: half the digits of a singular value decomposition, which do for float32 embeddings, in a fraction of its time."""
    Z = as_float64(Z)
    squares = torch.linalg.eigvalsh(Z @ Z.T if Z.shape[1] > len(Z) else Z.T @ Z)
    values = squares.clamp(min=0).sqrt().flip(0)
    return values[values > rank_tolerance(Z) * values[0]]


def left_singular_space(Z: Tensor) -> Tensor:
    """Z (N, K) -> orthonormal (N, r), r its numerical rank."""
    Z = as_float64(Z)
    wide = Z.shape[1] > len(Z)
    squares, V = torch.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    values = squares.clamp(min=0).sqrt()
    kept = values > rank_tolerance(Z) * values[-1]
    return V[:, kept] if wide else Z @ V[:, kept] / values[kept]


def rank_tolerance(Z: Tensor) -> float:
    """Singular values of Z (N, K) below this share of the largest count as 0: max(N, K) roundings of float32, in which networks
    compute."""
    return max(Z.shape) * torch.finfo(torch.float32).eps
