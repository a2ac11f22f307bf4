"""Random numbers for rows that are augmented together, each row with its own."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from ssl_runner.relation import copied


class Draw:
    """Draws for each of some rows from the run's generator: numbers on the device, choices on the host.

    What the host chooses tells it which rows an operation is computed for, without waiting for the device. There a second
    generator makes the choices, seeded by the state of the first, so that this state alone decides everything.
    """

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator):
        self.rows, self.device, self.generator, self.host = rows, device, generator, generator
        if device.type != "cpu":
            self.host = torch.Generator().manual_seed(crc32(generator.get_state().numpy().tobytes()))
            torch.rand(
                1, device=device, generator=generator
            )  # another state for the next draw, if nothing else is drawn

    def random(self, *after: int, before: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1): (*before, rows, *after)."""
        return torch.rand(*before, self.rows, *after, device=self.device, generator=self.generator)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.random()

    def coin(self, p: float) -> Tensor:
        """True with probability p: (rows,) on the host."""
        return torch.rand(self.rows, generator=self.host) < p

    def choice(self, k: int) -> Tensor:
        """0, 1, ... or k - 1, equally likely: (rows,) on the host."""
        return torch.randint(k, (self.rows,), generator=self.host)


@dataclass
class Drawn:
    """What was drawn for some rows: numbers (rows, ...) on the device, choices (rows,) on the host."""

    numbers: dict[str, Tensor]
    choices: dict[str, Tensor]

    def of(self, rows: Tensor, device: torch.device) -> "Drawn":
        """What was drawn for some of the rows, whose positions the host holds."""
        there = copied(rows, device)
        numbers = {name: drawn.index_select(0, there) for name, drawn in self.numbers.items()}
        return Drawn(numbers, {name: drawn[rows] for name, drawn in self.choices.items()})
