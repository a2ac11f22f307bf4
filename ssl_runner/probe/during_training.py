"""Probes on the validation split while training, and the choice of the epoch whose weights are kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from ssl_runner.data.dataset import DataSet
from ssl_runner.evaluator import Columns, Evaluator
from ssl_runner.model import SSLModel
from ssl_runner.probe.protocol import Classifier, evaluate
from ssl_runner.runs.files import CsvLog


class ProbeEvaluator(Evaluator):
    """Probe the backbone on the validation split, every `every` epochs. Appends rows to probe.csv.

    The last epoch is left to the final probes of the run.
    """

    after_last = False

    def __init__(self, every: int, data: DataSet, classifiers: Mapping[str, Classifier], log: CsvLog):
        super().__init__(every)
        self.data, self.classifiers, self.log = data, classifiers, log

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        self.probe(model, epoch)
        return {}

    def probe(self, model: SSLModel, epoch: int) -> float:
        """Append one row per classifier. Returns the top-1 accuracy of the first one, in [0, 1]."""
        rows = list(evaluate("backbone", model.backbone, self.data, self.classifiers, score_test=False))
        for row in rows:
            self.log.append({"epoch": epoch, **row})
        self.shown = {"val": f"{rows[0]['top1']:.4f}"}
        return rows[0]["top1"]


@dataclass
class Kept:
    """Weights of one epoch, on the CPU, and the validation accuracy of their first probe, in [0, 1]."""

    epoch: int
    val_top1: float
    weights: dict[str, Tensor]


class BestEpoch(ProbeEvaluator):
    """Keep the weights of the epoch with the best validation accuracy, and load them after training.

    The accuracy is that of the first classifier on the features of the backbone. The last epoch takes part.
    Ties go to the earlier epoch. The kept weights are part of every checkpoint, so a resumed run makes the
    same choice.
    """

    kept: Kept | None = None
    epoch = 0  # of the last call

    def __call__(self, model: SSLModel, epoch: int, last: bool) -> Columns | Callable[[], Columns]:
        self.epoch = epoch
        return super().__call__(model, epoch, last)

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        self.keep(model, epoch, self.probe(model, epoch))
        return {}

    def keep(self, model: SSLModel, epoch: int, val_top1: float) -> None:
        if self.kept is None or val_top1 > self.kept.val_top1:
            weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            self.kept = Kept(epoch, val_top1, weights)

    def finish(self, model: SSLModel) -> dict[str, Any]:
        """Probe the last epoch, and load the weights of the best one. Returns which one it is."""
        last_val_top1 = self.probe_first(model)
        self.keep(model, self.epoch, last_val_top1)
        assert self.kept is not None
        model.load_state_dict(self.kept.weights)
        return {
            "exported_epoch": self.kept.epoch,
            "exported_val_top1": self.kept.val_top1,
            "last_val_top1": last_val_top1,
        }

    def probe_first(self, model: SSLModel) -> float:
        """Return the top-1 accuracy of the first classifier, without a row in probe.csv."""
        first = dict(islice(self.classifiers.items(), 1))
        [row] = evaluate("backbone", model.backbone, self.data, first, score_test=False)
        return row["top1"]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": None if self.kept is None else dict(vars(self.kept))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = None if state["kept"] is None else Kept(**state["kept"])
