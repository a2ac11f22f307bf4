"""The interface of a solver: it sets the model's weights and yields one row of metrics.csv per epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any

from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel
from ssl_runner.relation.builders import RelationBuilder


class Save(Enum):
    """What a solver asks for when it calls `save` with its state."""

    HOLD = auto()  # keep a copy, which is written if the run ends before the next checkpoint
    WRITE = auto()  # write a checkpoint in the background
    WAIT = auto()  # write a checkpoint, and return when it is on disk


class Solver(ABC):
    """A solver, chosen by `_target_` in conf/solver/.

    It is called with model, loss, loader, relation and save as keyword arguments, and with its own settings.
    It calls save(state, how), with its state and a `Save`, wherever the run can resume from.
    If `trains`, it takes gradient steps and is called with optimizer, learning_rate, precision,
    clip_grad_norm, per_view and preemption as well; otherwise it computes in float32 and float64.

    `columns` are those of its rows, without the terms of the loss and seconds_*.
    """

    trains: bool = False
    columns: tuple[str, ...] = ("epoch", "step", "images_seen", "seconds", "images_per_s", "lr", "loss")
    model: SSLModel
    epoch: int = 0
    total_epochs: int
    last_row: dict[str, Any]
    shown: Mapping[str, str] = {}  # what evaluators add to the progress of training

    @classmethod
    def check_loss(cls, loss: Loss, relation: RelationBuilder) -> None:
        """Raise UsageError, before the data set is read, if the solver cannot handle the loss or relation."""

    @classmethod
    def check_model(cls, model: SSLModel) -> None:
        """Raise UsageError if the solver cannot handle the model."""

    @property
    def result_features(self) -> str:
        """The features whose probe accuracy is the run's result: "backbone" or "projector"."""
        return "backbone"

    def warnings(self) -> list[str]:
        """Lines on a result that would mislead, printed before the solver starts."""
        return []

    @property
    def epochs_done(self) -> int:
        """The epochs that need no further step. `epoch` may lack the last one, whose row is yielded again."""
        return self.epoch

    @abstractmethod
    def epochs(self) -> Iterator[dict[str, Any]]:
        """Yield one row of metrics.csv after each remaining epoch, and count the finished ones in `epoch`.

        A row may give the seconds of the epoch's parts in columns seconds_*. Those of `evaluators` are added
        to it, and images_per_s is then computed from their sum.
        """

    @abstractmethod
    def compile(self, graphs: bool = False) -> str | None:
        """Compile, with torch.compile, what runs in every step.

        `graphs` records a step in a CUDA graph as well. Returns why that is not possible, or None.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned."""
