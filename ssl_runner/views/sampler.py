"""Random augmentation parameters for a batch, drawn independently for every row."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from ssl_runner.device import to_device


class ParamSampler:
    """Draws one value per row: continuous numbers on the device, discrete choices on the host.

    With the choices on the host, selecting the rows to which an operation applies needs no host-device sync.
    If the device is not a CPU, a second generator on the host draws the choices. It is seeded with the state
    of `generator`, so that this state alone determines all values.
    """

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator):
        self.rows, self.device, self.generator, self.host = rows, device, generator, generator
        if device.type != "cpu":
            self.host = torch.Generator().manual_seed(crc32(generator.get_state().numpy().tobytes()))
            # advance the generator: the next sampler must differ even if this one draws no numbers
            torch.rand(1, device=device, generator=generator)

    def random(self, *after: int, before: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [0, 1), of shape (*before, rows, *after), on the device."""
        return torch.rand(*before, self.rows, *after, device=self.device, generator=self.generator)

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform numbers in [low, high), of shape (rows,), on the device."""
        return low + (high - low) * self.random()

    def coin(self, p: float) -> Tensor:
        """Bernoulli(p) samples, bool of shape (rows,), on the host."""
        return torch.rand(self.rows, generator=self.host) < p

    def choice(self, k: int) -> Tensor:
        """Uniform integers in [0, k), of shape (rows,), on the host."""
        return torch.randint(k, (self.rows,), generator=self.host)


@dataclass
class Params:
    """Sampled parameters by name: numbers (rows, ...) on the device, choices (rows,) on the host."""

    numbers: dict[str, Tensor]
    choices: dict[str, Tensor]

    def select(self, rows: Tensor, device: torch.device) -> "Params":
        """Return the parameters of the given rows; `rows` (B,) is an index tensor on the host."""
        device_rows = to_device(rows, device)
        numbers = {name: values.index_select(0, device_rows) for name, values in self.numbers.items()}
        return Params(numbers, {name: values[rows] for name, values in self.choices.items()})


@dataclass
class ViewIndex:
    """Indices of B views, (B,) int64 on the host: the image of each, its row of X, and its row of Params."""

    image: Tensor
    row: Tensor
    param: Tensor

    def select(self, order: Tensor) -> "ViewIndex":
        """The views at `order` (B,), an index tensor on the host."""
        return ViewIndex(self.image[order], self.row[order], self.param[order])
