"""Random numbers from a counter, in tensor operations: equal on all ranks, capturable in a CUDA graph."""

import math

import torch
from torch import Tensor, nn


class Counter(nn.Module):
    """A state that selects the random numbers. It starts at random, from torch's default generator.

    The state is a buffer: a checkpoint of the loss holds it, so a resumed run draws the same numbers.
    """

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randint(2**62, (), device="cpu"))

    def advance(self) -> None:
        """Select other numbers for the next step. Has no effect in eval mode and without gradients."""
        if self.training and torch.is_grad_enabled():
            self.state += 1

    def bits(self, n: int) -> Tensor:
        """n random integers, int64, uniform over all 64 bits: the SplitMix64 generator (Steele et al. 2014).

        Its own state for element i is hash(counter) + i times the increment. Products wrap at 64 bits.
        """
        i = torch.arange(n, device=self.state.device)
        return mix(mix(self.state * INCREMENT) + i * INCREMENT)

    def normal(self, rows: int, columns: int) -> Tensor:
        """Standard normal numbers (rows, columns), float32, by the Box-Muller transform."""
        bits = self.bits(rows * columns)
        radius, angle = (((bits >> shift) & (2**24 - 1)).float() + 0.5 for shift in (40, 8))
        radius, angle = (-2 * (radius / 2**24).log()).sqrt(), 2 * math.pi / 2**24 * angle
        return (radius * angle.cos()).view(rows, columns)


INCREMENT, *MULTIPLIERS = (
    n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed integers


def mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, a bijection of 64-bit integers."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ shifted_right(x, shift)) * multiplier
    return x ^ shifted_right(x, 31)


def shifted_right(x: Tensor, shift: int) -> Tensor:
    """Logical right shift: torch shifts signed integers arithmetically."""
    return (x >> shift) & (2 ** (64 - shift) - 1)
