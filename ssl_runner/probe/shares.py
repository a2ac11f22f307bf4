"""Label shares: class-balanced random subsets of the labelled training images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_runner.data.splits import balanced_order


@dataclass(frozen=True)
class LabelDraw:
    """One random subset: `share` of the labels, draw `number` from 0, and its `positions` (k,) int64."""

    share: float
    number: int
    positions: Tensor

    def columns(self) -> dict[str, float | int]:
        """The columns of probe.csv that identify the subset."""
        return {"label_share": self.share, "draw": self.number}

    def identity(self) -> dict[str, float | int | str]:
        """The columns, and the SHA-256 of the positions."""
        positions = hashlib.sha256(self.positions.cpu().numpy().tobytes())
        return {**self.columns(), "positions": positions.hexdigest()}


def label_draws(y: Tensor, shares: Sequence[float] | None, draws: int, seed: int) -> list[LabelDraw]:
    """Return `draws` class-balanced subsets of labels y (n,) for each of `shares`, none without shares.

    A subset holds round(share * n) positions, and at least one per class. Draw d cycles through the classes
    in an order of seed + d, so that within one draw a smaller subset is a part of each larger one.
    """
    if not shares:
        return []
    labels = y.cpu().numpy()
    orders = [torch.from_numpy(balanced_order(labels, seed + number)) for number in range(draws)]
    present = len(y.unique())
    return [
        LabelDraw(share, number, order[: max(round(share * len(y)), present)])
        for share in shares
        for number, order in enumerate(orders)
    ]
