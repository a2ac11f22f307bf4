"""Error of the losses if their matrix products rounded float32 factors to TF32, emulated on the CPU.

The results are the reason why `precision=tf32` does not apply to the losses (docs/losses.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Views

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default)
LOSSES: dict[str, Callable[[], Loss]] = {
    "vicreg": VICReg,
    "squared": partial(VICReg, variance="squared"),
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "centred barlow": partial(BarlowTwins, center=True),
    "spectral": SpectralContrastive,
    "centred spectral": partial(SpectralContrastive, center=True),
}


def to_tf32(x: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class InTF32(TorchDispatchMode):
    """Rounds the factors of matrix products. Sums are in float32, as in the tensor cores."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = (*args[:-2], *map(to_tf32, args[-2:]))
        return func(*args, **(kwargs or {}))


def embeddings(offset: float = 0.0, n: int = 256, K: int = 64) -> Tensor:
    """Two noisy views of correlated rows plus a constant, as a network returns them in bfloat16: (2n, K)."""
    rows = torch.randn(n, K) @ torch.randn(K, K) / K**0.5
    return (torch.cat([rows + 0.3 * torch.randn(n, K) for _ in range(2)]) + offset).bfloat16().float()


def gradient(loss: Loss, Z: Tensor, forward: bool, backward: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Terms and gradient, with TF32 in the products of the forward and of the backward pass."""
    Z = Z.clone().requires_grad_()
    with InTF32() if forward else torch.enable_grad():
        terms = loss.terms(Z, Views(len(Z) // 2, 2))
        total = loss.total(terms)
    with InTF32() if backward else torch.enable_grad():
        total.backward()
    assert Z.grad is not None
    return {name: term.detach() for name, term in terms.items()}, Z.grad


def errors(loss: Loss, Z: Tensor, forward: bool, backward: bool) -> tuple[float, float]:
    """Largest relative error of a term, and relative error of the gradient (Frobenius norm)."""
    exact_terms, exact = gradient(loss, Z.double(), False, False)
    terms, found = gradient(loss, Z, forward, backward)
    each = [abs(terms[name].item() / exact_terms[name].item() - 1) for name in terms]
    return max(each), ((found - exact).norm() / exact.norm()).item()


def test_to_tf32_rounds_to_ten_bits() -> None:
    x = torch.randn(1000)
    exponent = torch.frexp(x).exponent
    expected = torch.ldexp((torch.ldexp(x.double(), 11 - exponent)).round(), exponent - 11).float()
    assert_close(to_tf32(x), expected, rtol=0, atol=0)
    assert_close(to_tf32(x.bfloat16().float()), x.bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_accurate_in_float32_but_not_in_tf32(name: str, offset: float) -> None:
    """Z in bfloat16 is exact in TF32, but centred and normalised rows and G @ Z are not."""
    loss, Z = LOSSES[name](), embeddings(offset)
    fp32, tf32 = errors(loss, Z, False, False), errors(loss, Z, True, True)
    assert fp32[1] < 3e-5
    assert 1e-5 < tf32[1] < 2e-3
    assert tf32[1] > 10 * fp32[1]


def test_uncentred_barlow_term_loses_two_digits_in_tf32() -> None:
    """C_kk - 1 cancels for rows with a large mean."""
    fp32, _ = errors(BarlowTwins(), embeddings(10.0), False, False)
    tf32, _ = errors(BarlowTwins(), embeddings(10.0), True, True)
    assert fp32 < 5e-3
    assert tf32 > 1e-2


def test_simclr_gradient_at_small_temperature_is_wrong_in_tf32() -> None:
    """An error of a similarity is multiplied by 1 / tau. Here the loss is near 0: few negatives compete."""
    fp32, tf32 = (errors(SimCLR(0.05), embeddings(), on, on)[1] for on in (False, True))
    assert fp32 < 1e-3
    assert tf32 > 3e-2


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("name", [*LOSSES, "small tau"])
def test_tf32_in_backward_alone_costs_less_than_a_thousandth(name: str, offset: float) -> None:
    """`precision=tf32` computes the forward pass of the loss in float32, and any backward product in TF32."""
    loss = SimCLR(0.05) if name == "small tau" else LOSSES[name]()
    Z = embeddings(offset)
    assert errors(loss, Z, False, True)[0] == errors(loss, Z, False, False)[0]
    assert errors(loss, Z, False, True)[1] < 1e-3
