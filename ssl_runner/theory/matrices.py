"""Small matrix operations that the closed forms share, in float64 on the CPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.loss.kernels import unit_rows

# relative to the largest eigenvalue: closer eigenvalues form one eigenspace, smaller ones are 0
TIE_TOLERANCE = 1e-9
HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's default dtype and device


def as_float64(Z: Tensor) -> Tensor:
    """Z without gradient, on the CPU."""
    return Z.detach().cpu().double()


def centred(Z: Tensor) -> Tensor:
    return as_float64(Z) - as_float64(Z).mean(0)


def normalised(Z: Tensor) -> Tensor:
    return unit_rows(as_float64(Z))


def padded(values: Tensor, K: int) -> Tensor:
    """Zero-pad the last dimension to length K."""
    return F.pad(values, (0, K - values.shape[-1]))


def gram_singular_values(gram: Tensor) -> Tensor:
    """Nonzero singular values of Z, descending, from Z'Z or ZZ'. Values at rounding level count as zero."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
    return values[values > 1e-12 * values[:1]].sqrt()


def helmert(t: Tensor, q: int) -> Tensor:
    """First q columns of an orthonormal basis of the vectors orthogonal to t (M,), all t > 0: (M, q).

    Column k has k + 2 nonzero entries: t_i t_{k+1} for i <= k, then -sum_{i<=k} t_i^2, all normalised.
    """
    S = t.square().cumsum(0)
    columns = (t[:, None] * t[1 : q + 1]).triu()
    columns.diagonal(-1).copy_(-S[:q])
    return columns / (S[:q] * S[1 : q + 1]).sqrt()


def tight_frame(r: int, K: int) -> Tensor:
    """K unit vectors in r < K dimensions with FF' = K/r I: F (r, K).

    F holds rows of the Hartley transform, cos + sin of frequencies +-j.
    """
    frequencies = torch.tensor([j for j in range(-(r // 2), r // 2 + 1) if j or r % 2], **HOST)
    angles = 2 * math.pi * torch.outer(frequencies, torch.arange(K, **HOST)) / K
    return (angles.cos() + angles.sin()) / r**0.5
