"""Measures of an embedding against labels and against the closed form of a loss, in float64."""

import torch
from torch import Tensor

from ssl_runner.theory.matrices import as_float64, centred
from ssl_runner.theory.optima import Optimum
from ssl_runner.theory.selection import Selection


def alignment(Z: Tensor, best: Optimum) -> float | None:
    """Mean cos^2 of the principal angles between Z (N, K) and the closed form, in [0, 1].

    Compares the left singular space of the canonicalised Z with the closest optimal subspace. At random it is
    about dim / N. None if the optimal subspace is not known.
    """
    if best.spaces is None:
        return None
    U, _ = left_singular_vectors(best.canonicalize(Z))
    angles = min(U.shape[1], sum(q for _, q in best.spaces))
    return projected_energy(U, best.spaces)[0] / angles if angles else 0.0


def label_energy_of_optimum(Y: Tensor, best: Optimum) -> tuple[float | None, float | None]:
    """|U'Yc|_F^2 / |Yc|_F^2, with U the eigenvectors of the closed form and Yc centred targets Y (N, C).

    For one-hot targets this is the share of label energy that a network trained to the optimum on G exposes
    to a linear probe. Returns the maximum and the mean over the choices within a tied eigenspace, or None
    twice if the eigenvectors are not known.
    """
    if best.spaces is None:
        return None, None
    Yc = centred(Y)
    total = float(Yc.square().sum())
    maximum, mean = projected_energy(Yc, best.spaces)
    return (maximum / total, mean / total) if total else (0.0, 0.0)


def label_energy(U: Tensor, Y: Tensor) -> float:
    """|U'Yc|_F^2 / |Yc|_F^2, with U (N, r) the left singular vectors of centred Z and targets Y (N, C).

    The share of the targets' variance that a linear map with an intercept explains on these N rows. At random
    it is about rank / N.
    """
    Yc = centred(Y)
    total = float(Yc.square().sum())
    return float((U.T @ Yc).square().sum()) / total if total else 0.0


def projected_energy(U: Tensor, spaces: Selection) -> tuple[float, float]:
    """|P U|_F^2 for U (N, r) and the projector P onto the selected dimensions of eigenspaces.

    Any q dimensions of a space of which only q are used are optimal. Returns the maximum and the mean over
    these choices.
    """
    maximum = mean = 0.0
    for space, q in spaces:
        energy = U.T @ space.project(U)  # (r, r)
        trace = float(energy.trace())
        if q >= min(space.dim, len(energy)):
            maximum += trace
        else:
            maximum += float(torch.linalg.eigvalsh(energy)[-q:].clamp(min=0).sum())
        mean += trace * q / space.dim
    return maximum, mean


def singular_values(Z: Tensor) -> Tensor:
    """Singular values of Z (N, K) above `rank_tolerance`: (r,) float64, descending, r the numerical rank.

    Computed from the smaller Gram matrix. This halves the digits, which suffices for float32 embeddings, and
    takes a fraction of the time of an SVD.
    """
    Z = as_float64(Z)
    squares = torch.linalg.eigvalsh(Z @ Z.T if Z.shape[1] > len(Z) else Z.T @ Z)
    values = squares.clamp(min=0).sqrt().flip(0)
    return values[values > rank_tolerance(Z) * values[0]]


def left_singular_vectors(Z: Tensor) -> tuple[Tensor, Tensor]:
    """U (N, r) and the singular values (r,) of Z (N, K), descending, with r its numerical rank."""
    Z = as_float64(Z)
    wide = Z.shape[1] > len(Z)
    squares, V = torch.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    values, V = squares.clamp(min=0).sqrt().flip(0), V.flip(1)
    r = int((values > rank_tolerance(Z) * values[0]).sum())
    values, V = values[:r], V[:, :r]
    return (V if wide else Z @ V / values), values


def rank_tolerance(Z: Tensor) -> float:
    """Relative threshold for nonzero singular values of Z (N, K): max(N, K) eps, with eps of float32.

    Networks compute in float32 or less, whatever the precision of Z.
    """
    return max(Z.shape) * torch.finfo(torch.float32).eps
