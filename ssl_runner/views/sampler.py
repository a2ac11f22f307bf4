"""Random augmentation parameters for a batch, drawn independently for every row."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DRAWS = 41  # uniform numbers per row for a policy with all operations


class ParamSampler:
    """Draws one value per row from a generator, on the device of the generator."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator):
        self.rows, self.device, self.generator = rows, device, generator

    def random(self, *after: int, before: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [0, 1), of shape (*before, rows, *after)."""
        return torch.rand(*before, self.rows, *after, device=self.device, generator=self.generator)

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform numbers in [low, high), of shape (rows,)."""
        return low + (high - low) * self.random()

    def coin(self, p: float) -> Tensor:
        """Bernoulli(p) samples, bool of shape (rows,)."""
        return self.random() < p

    def choice(self, k: int) -> Tensor:
        """Uniform integers in [0, k), of shape (rows,)."""
        return torch.randint(k, (self.rows,), device=self.device, generator=self.generator)


class UniformSampler(ParamSampler):
    """Takes its values from uniform numbers in [0, 1) that were drawn before: uniforms (rows, MAX_DRAWS).

    The sampling is then a pure function of a tensor, which torch.compile accepts; it refuses generators.
    """

    def __init__(self, uniforms: Tensor):
        self.uniforms, self.taken = uniforms, 0
        self.rows, self.device = len(uniforms), uniforms.device

    def random(self, *after: int, before: tuple[int, ...] = ()) -> Tensor:
        start, self.taken = self.taken, self.taken + math.prod(before) * math.prod(after)
        numbers = self.uniforms[:, start : self.taken].T.reshape(*before, *after, self.rows)
        return numbers.movedim(-1, len(before))

    def choice(self, k: int) -> Tensor:
        return (k * self.random()).long().clamp_(max=k - 1)  # k u rounds to k for u close to 1


def pick(index: Tensor, *values: Tensor) -> Tensor:
    """Return values[index] elementwise; all arguments are broadcast.

    torch.compile fuses this with its inputs and outputs, unlike `torch.stack` and `torch.gather`.
    """
    chosen = values[-1]
    for k, value in enumerate(values[:-1]):
        chosen = torch.where(index == k, value, chosen)
    return chosen


Params = dict[str, Tensor]  # sampled parameters by name, each of shape (rows, ...)


@dataclass
class ViewIndex:
    """Indices of B views, (B,) int64 on the host: the image of each, its row of X, and its row of Params."""

    image: Tensor
    row: Tensor
    param: Tensor
