"""`solver=closed_form` and the new relations through the command line, as a user calls them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.testing import assert_close

from ssl_runner.backbone import LinearBackbone
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Labels, Views, builders
from ssl_runner.theory import solver
from ssl_runner.theory.solver import ClosedForm, MomentsGap, stream_moments
from ssl_runner.views.policy import Augment
from tests.conftest import run_folder
from tests.test_dataset import CPU, load, toy

SMALL = (
    "dataset.subset=200 batch_size=50 epochs=2 device=cpu probe.probes=[linear] probe.features=[backbone]"
    " diagnostics.images=40 diagnostics.every=1"
)
LOSSES = ["vicreg", "vicreg variance=squared beta=25", "simclr", "spectral center=true", "barlow"]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_linear_backbone_is_solved_end_to_end(ssl_run, loss: str) -> None:
    code, out, err = ssl_run(
        f"solver=closed_form backbone=linear backbone.width=12 loss={loss} {SMALL} diagnostics.moments=2"
    )
    assert (code, err) == (0, "")
    folder = run_folder(out)
    [row] = rows(folder / "metrics.csv")
    assert (row["epoch"], row["step"], row["images_seen"], row["lr"]) == ("2", "6", "300", "")
    assert row["loss_kind"] == ("exact" if "squared" in loss or loss == "simclr" else "upper bound")
    assert row["loss_name"] == {"v": "VICReg", "s": "SpectralContrastive", "b": "BarlowTwins"}[loss[0]]
    assert_close(
        float(row["moments_loss"]), float(row["loss"]), rtol=1e-4, atol=1e-4
    )  # the network's weights are float32
    assert_close(float(row["moments_floor"]), float(row["loss"]))
    assert json.loads((folder / "run.json").read_text())["precision"] == "fp32"
    assert "projector=0 parameters" in out


def test_the_head_of_a_frozen_backbone_is_solved_and_is_what_the_run_is_judged_by(ssl_run) -> None:
    code, out, err = ssl_run(
        f"solver=closed_form backbone=convnet backbone.widths=[8,16] projector.K=12 loss=barlow {SMALL}"
    )
    assert (code, err) == (0, "")
    folder = run_folder(out)
    scores = {
        row["features"]: row["top1"] for row in rows(folder / "probe.csv") if row["eval_split"] == "test"
    }
    assert scores.keys() == {"projector", "backbone"}
    assert f"top1={float(scores['projector']):.4f} " in out


def test_weights_of_another_run_are_the_starting_point(ssl_run) -> None:
    small = f"{SMALL} backbone.widths=[8,16]"
    _, out, _ = ssl_run(f"loss=vicreg projector.width=16 projector.K=8 {small}")
    weights = run_folder(out) / "backbone.safetensors"
    expected = [row["top1"] for row in rows(run_folder(out) / "probe.csv") if row["features"] == "backbone"]
    code, out, err = ssl_run(f"solver=closed_form projector.K=8 weights={weights} {small}")
    assert (code, err) == (0, "")
    assert [
        row["top1"] for row in rows(run_folder(out) / "probe.csv") if row["features"] == "backbone"
    ] == expected
    code, _, err = ssl_run(f"solver=closed_form backbone.widths=[8,8] weights={weights} {SMALL}")
    assert code == 1
    assert "expected safetensors weights of this backbone" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "relation", ["neighbors", "neighbors relation.queue=64", "noisy", "noisy relation.of=views", "edges"]
)
@pytest.mark.parametrize("normalized", ["false", "true"])
def test_every_relation_trains(ssl_run, tmp_path: Path, relation: str, normalized: str) -> None:
    pairs = np.random.default_rng(0).integers(0, 5000, (1_000_000, 2))  # 8 of 100 pairs of a batch
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    np.savetxt(tmp_path / "pairs.csv", pairs, fmt="%d", delimiter=",", header="i,j", comments="")
    path = "relation.path=pairs.csv" if relation == "edges" else ""
    tiny = "backbone.widths=[8,16] projector.width=16 projector.K=8 probe.every=0"
    code, out, err = ssl_run(f"relation={relation} relation.normalized={normalized} {path} {tiny} {SMALL}")
    assert (code, err) == (0, "")
    table = rows(run_folder(out) / "metrics.csv")
    assert len(table) == 2
    assert all(np.isfinite(float(row[name])) for row in table for name in ("loss", "loss_floor", "alignment"))
    if relation == "edges":
        assert json.loads((run_folder(out) / "run.json").read_text())["relation"]["pairs"] > 1000
        _, out, _ = ssl_run(f"relation=views relation.normalized={normalized} {tiny} {SMALL}")
        assert rows(run_folder(out) / "metrics.csv")[0]["loss"] != table[0]["loss"]
    if relation != "neighbors relation.queue=64":
        code, _, err = ssl_run(
            f"solver=closed_form relation={relation} {path} backbone=linear backbone.width=8 {SMALL}"
        )
        assert (code, err) == (0, "")


def test_neighbours_in_a_queue_have_no_closed_form(ssl_run) -> None:
    code, _, err = ssl_run(f"solver=closed_form backbone=linear relation=neighbors relation.queue=64 {SMALL}")
    assert code == 1
    assert err.startswith("solver=closed_form relates rows of one batch: set relation.queue=0")


def test_columns_are_empty_between_diagnostics(ssl_run) -> None:
    tiny = "backbone.widths=[8,16] projector.width=16 projector.K=8"
    _, out, _ = ssl_run(f"{tiny} {SMALL} epochs=3 diagnostics.every=2")
    table = rows(run_folder(out) / "metrics.csv")
    assert [bool(row["rank"]) for row in table] == [False, True, True]
    _, out, _ = ssl_run(f"{tiny} {SMALL} diagnostics.every=0")
    assert "rank" not in rows(run_folder(out) / "metrics.csv")[0]
    assert not (run_folder(out) / "spectrum.csv").exists()


def solver(
    loss: Loss, relation: builders.RelationBuilder, width: int = 4, batch_size: int = 20
) -> ClosedForm:
    source = toy()
    source.images = torch.randint(
        0, 256, source.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = load(source)
    relation.bind(data.pretrain.labels)
    augment = Augment({"all": {"crop": {"scale": [0.5, 1.0]}}})
    return ClosedForm(
        LinearBackbone(48, width),
        torch.nn.Identity(),
        loss,
        data,
        augment,
        relation,
        V=2,
        batch_size=batch_size,
        passes=1,
        ridge=0.0,
        seed=0,
    )


def all_views(solver: ClosedForm) -> tuple[torch.Tensor, torch.Tensor]:
    """The views that the solver streams, all in one batch, and the labels of their originals."""
    order = torch.randperm(len(solver.data.pretrain), generator=torch.Generator().manual_seed(0))
    order = order[: len(order) // solver.batch_size * solver.batch_size]
    generator = torch.Generator().manual_seed(0)
    mean, std = solver.data.mean, solver.data.std
    batches = list(solver.data.pretrain.batches(order, len(order), CPU))
    views = [solver.augment(images, 2, mean, std, generator).unflatten(0, (2, -1)) for images, _ in batches]
    return torch.cat(views, 1).flatten(0, 1), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize(
    "loss",
    [
        VICReg(2.0, 2.0, 0.5, variance="squared"),
        SpectralContrastive(),
        SpectralContrastive(center=True),
        BarlowTwins(0.1),
        VICReg(),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize(
    "relation",
    [builders.FromViews(), builders.FromLabels(True), builders.FromLabels()],
    ids=["views", "normalized", "labels"],
)
def test_the_reported_loss_is_that_of_all_rows_at_once(
    loss: Loss, relation: builders.RelationBuilder
) -> None:
    """Of views, whose pairs lie within batches, and of labels, whose pairs reach over all."""
    fitted = solver(loss, relation)
    [row] = fitted.epochs()
    X, labels = all_views(fitted)
    G = (
        Views(len(labels), 2)
        if isinstance(relation, builders.FromViews)
        else Labels(labels.repeat(2), normalized=relation.normalized)
    )
    with torch.no_grad():
        Z = fitted.backbone(X)
    assert Z.mean(0).abs().max() <= 1e-4 * Z.abs().max() or loss.center is False
    assert_close(float(loss(Z.double(), G)), row["loss"], rtol=1e-4, atol=1e-4)


def test_the_labels_relation_gives_linear_discriminant_analysis() -> None:
    fitted = solver(BarlowTwins(), builders.FromLabels(), width=2)
    list(fitted.epochs())
    X, labels = all_views(fitted)
    theirs = LinearDiscriminantAnalysis(solver="svd").fit(
        X.flatten(1).double().numpy(), labels.repeat(2).numpy()
    )
    Q, P = (
        torch.linalg.qr(M)[0]
        for M in (fitted.backbone.body[1].weight.detach().T.double(), torch.from_numpy(theirs.scalings_))
    )
    classes = len(fitted.data.classes)
    assert torch.linalg.svdvals(Q[:, : classes - 1].T @ P[:, : classes - 1]).min() > 1 - 1e-3


def test_the_gap_of_a_trained_matrix_is_on_the_moments_of_the_solver() -> None:
    fitted = solver(SimCLR(), builders.FromViews())
    [row] = fitted.epochs()
    matrix = fitted.backbone.body[1]
    moments = stream_moments(
        torch.nn.Flatten(),
        48,
        fitted.data,
        fitted.augment,
        builders.FromViews(),
        V=2,
        batch_size=20,
        passes=1,
        seed=0,
    ).centred()
    gap = MomentsGap(moments, fitted.loss, 4)
    there = gap(matrix)
    assert_close(there["moments_floor"], row["loss"])
    assert_close(there["moments_loss"], row["loss"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        matrix.weight.normal_()
    assert gap(matrix)["moments_loss"] > row["loss"]


def test_the_solver_goes_on_from_its_state() -> None:
    first, second = solver(BarlowTwins(), builders.FromViews()), solver(BarlowTwins(), builders.FromViews())
    table = list(first.epochs())
    second.load_state_dict(first.state_dict())
    second.data = None  # it solves nothing again
    assert list(second.epochs()) == table
    assert torch.equal(second.backbone.body[1].weight, first.backbone.body[1].weight)


def test_batches_of_any_size_give_the_same_moments() -> None:
    """Views are drawn by batch, so the images are left as they are."""
    moments = []
    for batch_size in (20, 30):
        fitted = solver(VICReg(), builders.FromLabels(True), batch_size=batch_size)
        settings = {"V": 2, "batch_size": batch_size, "passes": 1, "seed": 0}
        m = stream_moments(
            torch.nn.Flatten(), 48, fitted.data, Augment({"all": {}}), fitted.relation, **settings
        ).centred()
        moments.append((m, len(fitted.data.pretrain) // batch_size * batch_size))
    (first, rows_first), (second, rows_second) = moments
    assert rows_first == rows_second
    for name in ("mean", "XHX", "XGX", "XDX"):
        assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-3)


def test_what_is_not_one_matrix_is_refused() -> None:
    with pytest.raises(closed_form.UsageError, match="finds one matrix"):
        solver.frozen_and_matrix(LinearBackbone(4, 2), torch.nn.Sequential())


def test_constant_features_are_refused() -> None:
    for loss in (VICReg(), SimCLR(), SpectralContrastive(center=True), BarlowTwins()):
        fitted = solver(loss, builders.FromViews())
        fitted.data.pretrain.images.fill_(7)
        with pytest.raises(closed_form.UsageError, match="the same on every row"):
            list(fitted.epochs())
