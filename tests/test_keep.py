"""probe.keep=best: the weights of the epoch with the best validation probe are exported and probed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ssl_runner import pipeline
from ssl_runner.backbone import convnet
from ssl_runner.errors import UsageError
from ssl_runner.evaluator import Evaluator
from ssl_runner.model import SSLModel
from ssl_runner.probe import BestEpoch, KnnProbe
from ssl_runner.projector import mlp
from ssl_runner.runs.files import CsvLog
from ssl_runner.runs.weights import plain_names
from tests.helpers import TINY, noise_loader, preempt_after, run_folder, table

KEEP = f"{TINY} epochs=4 probe.every=1 probe.keep=best optimizer.lr=0.02"


class SaveBackbone(Evaluator):
    """Write the backbone of every epoch to the run folder."""

    def __init__(self, loader: Any, relation: Any, loss: Any, folder: Path):
        super().__init__()
        self.folder = folder

    def evaluate(self, model: SSLModel, epoch: int) -> dict[str, Any]:
        weights = {name: value.contiguous() for name, value in model.backbone.state_dict().items()}
        safetensors.torch.save_file(weights, self.folder / f"{epoch}.safetensors")
        return {}


def trained(accuracies: list[float], every: int = 1) -> tuple[SSLModel, dict[str, Any]]:
    """A model whose first weights equal the epoch, and the facts of its best epoch."""
    model = SSLModel(convnet(3, 4, [4]), mlp(4, 4, 2, 3))
    best = BestEpoch(every, noise_loader().data, {"knn": KnnProbe}, CsvLog(None))
    parameter = next(model.projector.parameters())
    best.probe = lambda model, epoch: accuracies[epoch - 1]  # type: ignore[method-assign]
    for epoch in range(1, len(accuracies) + 1):
        torch.nn.init.constant_(parameter, epoch)
        best(model, epoch, last=epoch == len(accuracies))
    best.probe_first = lambda model: accuracies[-1]  # type: ignore[method-assign]
    return model, best.finish(model)


@pytest.mark.parametrize(
    ("accuracies", "every", "expected"),
    [
        ([0.1, 0.5, 0.3], 1, 2),
        ([0.1, 0.5, 0.5, 0.5], 1, 2),  # ties go to the earlier epoch
        ([0.1, 0.5, 0.6], 1, 3),  # the last epoch takes part
        ([0.9, 0.2, 0.8, 0.1, 0.3], 2, 5),  # only epochs 2, 4 and the last are probed
        ([0.9, 0.2, 0.1], 5, 3),
    ],
)
def test_best_epoch_is_loaded(accuracies: list[float], every: int, expected: int) -> None:
    model, facts = trained(accuracies, every)
    assert facts == {
        "exported_epoch": expected,
        "exported_val_top1": accuracies[expected - 1],
        "last_val_top1": accuracies[-1],
    }
    assert torch.all(next(model.projector.parameters()) == expected)


def test_exported_weights_are_those_of_the_best_epoch(ssl_run, tmp_path: Path) -> None:
    code, out, err = ssl_run(f"{KEEP} +evaluators.save._target_=tests.test_keep.SaveBackbone")
    assert (code, err) == (0, "")
    folder = run_folder(out)
    record = json.loads((folder / "run.json").read_text())
    rows = table(folder / "probe.csv")
    val = {int(row["epoch"]): float(row["top1"]) for row in rows[:3]} | {4: record["last_val_top1"]}
    best = max(val, key=lambda epoch: (val[epoch], -epoch))
    assert best < 4, "the run should get worse at its end for this test"
    assert (record["exported_epoch"], record["exported_val_top1"]) == (best, val[best])
    exported = safetensors.torch.load_file(folder / "backbone.safetensors")
    expected = plain_names(safetensors.torch.load_file(folder / f"{best}.safetensors"))
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert float(rows[3]["top1"]) == record["val_top1"] == val[best]  # the final probes are of these weights


@pytest.mark.parametrize("step", [8, 12])
def test_preempted_run_keeps_the_same_epoch(
    step: int, ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_folder(ssl_run(f"{KEEP} hydra.run.dir=whole")[1])
    with monkeypatch.context() as patch:
        preempt_after(step, patch)
        assert ssl_run(f"{KEEP} hydra.run.dir=mine")[0] == 75
    assert ssl_run("resume=mine")[0] == 0
    for name in ("probe.csv", "metrics.csv"):
        assert table(tmp_path / "mine" / name) == table(whole / name)
    assert (tmp_path / "mine" / "backbone.safetensors").read_bytes() == (
        whole / "backbone.safetensors"
    ).read_bytes()


def test_final_probes_carry_the_exported_epoch(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run resumes after some of its final probes."""
    settings = f"{KEEP} probe.features=[backbone,pixels] probe.cache=false"
    whole = run_folder(ssl_run(f"{settings} hydra.run.dir=whole")[1])
    rows = table(whole / "probe.csv")
    best = json.loads((whole / "run.json").read_text())["exported_epoch"]
    assert [row["epoch"] for row in rows[:3]] == ["1", "2", "3"]
    assert [row["epoch"] for row in rows[3:]] == [str(best)] * 4
    assert best < 4
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate_seeded", stop_before_pixels(pipeline.evaluate_seeded))
        assert ssl_run(f"{settings} hydra.run.dir=mine")[0] != 0
    assert len(table(tmp_path / "mine" / "probe.csv")) == 5
    assert ssl_run("resume=mine")[0] == 0
    assert table(tmp_path / "mine" / "probe.csv") == rows


def stop_before_pixels(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def stopping(features: str, *others: Any) -> Any:
        if features == "pixels":
            raise UsageError("stop")
        return evaluate(features, *others)

    return stopping


def test_keep_best_needs_probes_while_training(ssl_run) -> None:
    code, out, err = ssl_run(f"{TINY} probe.keep=best")
    assert (code, out) == (1, "")
    assert err == "probe.keep=best: expected probe.every >= 1; add probe.every=1, or use keep=last\n"
