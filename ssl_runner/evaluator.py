"""Evaluators: called after every epoch with the model, they add columns to metrics.csv or write files of their own."""

from typing import Any

from ssl_runner.model import SSLModel


class Evaluator:
    """Base class. A subclass names its `columns` and computes them in `evaluate`, every `every` epochs and after the last one.

    metrics.csv has the columns of its first row, so `evaluate` returns all of `columns` each time; they are empty in other epochs.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, every: int = 1):
        self.every = every

    def __call__(self, model: SSLModel, epoch: int, last: bool) -> dict[str, Any]:
        """Columns of the row of `epoch`, counted from 1; `last`: no epoch follows."""
        due = epoch % self.every == 0 or last
        return self.evaluate(model, epoch) if due else dict.fromkeys(self.columns)

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        """Values of `columns` for the model. Restore the mode of its modules (`ssl_runner.model.eval_mode`)."""
        raise NotImplementedError

    def finish(self, model: SSLModel) -> None:
        """Called once, after the last epoch."""
