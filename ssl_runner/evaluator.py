"""Evaluators: called with the model after every epoch, they add columns to metrics.csv or write files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ssl_runner.errors import UsageError
from ssl_runner.model import SSLModel

Columns = dict[str, Any]


class Evaluator:
    """Base class. A subclass names its `columns` and computes them in `evaluate`.

    `evaluate` runs every `every` epochs and, if `after_last`, after the last one; in other epochs the columns
    are empty. A resumed run builds the evaluator again: what it keeps between epochs is in `state_dict`.
    Raises ValueError for every < 1.
    """

    columns: tuple[str, ...] = ()
    after_last: bool = True
    shown: Mapping[str, str] = {}  # short texts for the progress of training, such as {"val": "0.93"}
    quick: bool = False  # takes about a second; before others the state of the training is written to disk

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(
                f"every={every}: expected an integer >= 1; leave the evaluator out to turn it off"
            )
        self.every = every

    def __call__(self, model: SSLModel, epoch: int, last: bool) -> Columns | Callable[[], Columns]:
        """Values of `columns` in the row of `epoch`, counted from 1, or a function that returns them.

        `last`: no epoch follows. Raises ValueError, here or in the function, if `evaluate` does not return
        exactly `columns`, since the header of metrics.csv is written once.
        """
        if not self.due(epoch, last):
            return dict.fromkeys(self.columns)
        values = self.evaluate(model, epoch)
        return (lambda: self._checked(values())) if callable(values) else self._checked(values)

    def due(self, epoch: int, last: bool = False) -> bool:
        """Whether `evaluate` runs in this epoch."""
        return self.after_last if last else epoch % self.every == 0

    def _checked(self, values: Columns) -> Columns:
        if set(values) != set(self.columns):
            raise ValueError(
                f"{type(self).__name__}.evaluate returned columns {sorted(values)}: expected"
                f" {sorted(self.columns)}; return every column each time"
            )
        return {name: values[name] for name in self.columns}

    def check(self, model: SSLModel) -> None:
        """Raise UsageError, before training, for a model that cannot be evaluated."""

    def evaluate(self, model: SSLModel, epoch: int) -> Columns | Callable[[], Columns]:
        """Values of `columns` for the model. Every rank calls this; the values of rank 0 are written.

        Gradients are enabled. The modes of the model's modules must be restored
        (`ssl_runner.model.eval_mode`).

        May return a function that returns the values instead. It is called once, in a background thread,
        while training continues, and before that of a later epoch. It must not use the model, the device or
        torch's global generator.
        """
        raise NotImplementedError

    def finish(self, model: SSLModel) -> dict[str, Any] | None:
        """Called by every rank after the last epoch, and again if the run is resumed after it.

        May return fields of run.json.
        """

    def state_dict(self) -> dict[str, Any]:
        """State to store in every checkpoint. It may hold only what `torch.load(weights_only=True)` reads."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned."""


def merge(row: Columns, columns: Columns) -> Columns:
    """Add an evaluator's columns to a row of metrics.csv. Raises ValueError for a name that is taken."""
    if taken := row.keys() & columns.keys():
        raise ValueError(
            f"evaluators: metrics.csv already has {', '.join(sorted(taken))}; rename the columns"
        )
    return row | columns


def check_columns(of_solver: Iterable[str], terms: Iterable[str], evaluators: Sequence[Evaluator]) -> None:
    """Raise UsageError for a column of metrics.csv that two parts of the run would write.

    of_solver  columns of every row, such as loss
    terms      names of the terms of the loss
    """
    writers = dict.fromkeys(of_solver, "the run itself")
    parts = [("the loss", terms), *((type(one).__name__, one.columns) for one in evaluators)]
    for part, names in parts:
        for name in names:
            if name in writers:
                raise UsageError(
                    f"'{name}' of {part}: expected a name that no other column of metrics.csv has, but"
                    f" {writers[name]} writes one of this name; rename it"
                )
            writers[name] = part
