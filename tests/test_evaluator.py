"""Evaluators: in which epochs they run, and what they leave in the other epochs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssl_runner.backbone import convnet
from ssl_runner.evaluator import Evaluator, merge
from ssl_runner.model import SSLModel
from ssl_runner.probe import KnnProbe, ProbeEvaluator
from ssl_runner.projector import identity
from ssl_runner.runs.files import CsvLog
from tests.helpers import noise_loader, table


class EpochNumber(Evaluator):
    columns = ("number", "double")

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        return {"number": epoch, "double": 2 * epoch}


def model() -> SSLModel:
    return SSLModel(convnet(3, 4, [4]), identity(4))


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [1, 2, 3, 4, 5]),
        (2, [None, 2, None, 4, 5]),
        (3, [None, None, 3, None, 5]),
        (9, [None, None, None, None, 5]),
    ],
)
def test_evaluator_runs_every_n_epochs_and_after_the_last(every: int, expected: list[int | None]) -> None:
    evaluator, network = EpochNumber(every), model()
    rows = [evaluator(network, epoch, last=epoch == 5) for epoch in range(1, 6)]
    assert [row["number"] for row in rows] == expected
    assert all(tuple(row) == EpochNumber.columns for row in rows)


def test_evaluator_rejects_period_below_one() -> None:
    with pytest.raises(ValueError, match="every=0: expected an integer >= 1"):
        EpochNumber(0)


@pytest.mark.parametrize("values", [{"number": 1}, {"number": 1, "double": 2, "triple": 3}])
def test_evaluator_must_return_its_columns(values: dict[str, int]) -> None:
    evaluator = EpochNumber()
    evaluator.evaluate = lambda model, epoch: values
    with pytest.raises(ValueError, match=r"expected \['double', 'number'\]; return every column each time"):
        evaluator(model(), 1, last=False)


def test_columns_have_the_order_of_the_header() -> None:
    evaluator = EpochNumber()
    evaluator.evaluate = lambda model, epoch: {"double": 2, "number": 1}
    assert list(evaluator(model(), 1, last=False)) == ["number", "double"]


def test_merge_rejects_a_column_that_exists() -> None:
    assert merge({"epoch": 1, "loss": 0.5}, {"number": 1}) == {"epoch": 1, "loss": 0.5, "number": 1}
    with pytest.raises(ValueError, match=r"metrics\.csv already has loss; rename the columns"):
        merge({"epoch": 1, "loss": 0.5}, {"loss": 1, "number": 1})


def test_probe_evaluator_appends_validation_rows_except_after_the_last_epoch(tmp_path: Path) -> None:
    """After the last epoch the run itself probes, and scores the test split."""
    data, network = noise_loader().data, model()
    classifiers = {"nearest": partial(KnnProbe), "again": partial(KnnProbe)}
    evaluator = ProbeEvaluator(2, data, classifiers, CsvLog(tmp_path / "probe.csv"))
    assert [evaluator(network, epoch, last=epoch == 6) for epoch in range(1, 7)] == [{}] * 6
    rows = table(tmp_path / "probe.csv")
    assert [(row["epoch"], row["probe"]) for row in rows] == [
        ("2", "nearest"),
        ("2", "again"),
        ("4", "nearest"),
        ("4", "again"),
    ]
    assert {(row["features"], row["eval_split"]) for row in rows} == {("backbone", "val")}
