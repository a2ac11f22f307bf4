"""`solver=closed_form` and the relations, from the command line and as objects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.testing import assert_close

from ssl_runner.backbone import Backbone, LinearBackbone, linear
from ssl_runner.errors import UsageError
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.model import SSLModel
from ssl_runner.relation import Labels, Views, builders
from ssl_runner.theory import value_of
from ssl_runner.theory.solver import ClosedForm, MomentsGap, split_linear_layer, stream_moments
from ssl_runner.views import Augment
from tests.helpers import noise_loader, run_folder, table

SMALL = (
    "dataset.subset=200 batch_size=50 epochs=2 device=cpu probe.probes=[linear] probe.features=[backbone]"
    " diagnostics.num_images=40 diagnostics.every=1 embedding.method=none"
)
LOSSES = [
    "vicreg",
    "vicreg variance=squared beta=25",
    "simclr",
    "spectral center=true",
    "barlow",
    "wmse unit_rows=false",
]


@pytest.mark.parametrize("loss", LOSSES)
def test_linear_backbone_is_solved_end_to_end(ssl_run, loss: str) -> None:
    gap = "+evaluators.moments._target_=ssl_runner.theory.solver.MomentsGap +evaluators.moments.passes=2"
    code, out, err = ssl_run(
        f"solver=closed_form backbone=linear backbone.width=12 loss={loss} {SMALL} {gap}"
    )
    assert (code, err) == (0, "")
    folder = run_folder(out)
    [row] = table(folder / "metrics.csv")
    solved = float(row["loss"])
    assert_close(float(row["moments_loss"]), solved, rtol=1e-4, atol=1e-4)  # the model's weights are float32
    assert_close(float(row["moments_closed_form"]), solved)
    assert (row["epoch"], row["step"], row["images_seen"], row["lr"]) == ("2", "6", "300", "")
    assert row["loss_kind"] == ("upper bound" if loss in ("vicreg", "barlow") else "exact")
    names = {"v": "VICReg", "s": "SpectralContrastive", "b": "BarlowTwins", "w": "WMSE"}
    assert row["loss_name"] == names[loss[0]]
    assert json.loads((folder / "run.json").read_text())["precision"] == "fp32"
    assert "projector=0 parameters" in out


def test_solved_projector_gives_the_result_of_the_run(ssl_run) -> None:
    code, out, err = ssl_run(
        f"solver=closed_form backbone=convnet backbone.widths=[8,16] projector.K=12 loss=barlow {SMALL}"
    )
    assert (code, err) == (0, "")
    scores = {
        row["features"]: row["top1"]
        for row in table(run_folder(out) / "probe.csv")
        if row["eval_split"] == "test"
    }
    assert scores.keys() == {"projector", "backbone"}
    assert f"top1={float(scores['projector']):.4f} " in out


def test_closed_form_starts_from_initial_weights(ssl_run) -> None:
    small = f"{SMALL} backbone.widths=[8,16]"
    _, out, _ = ssl_run(f"loss=vicreg projector.width=16 projector.K=8 {small}")
    exported = run_folder(out) / "backbone.safetensors"
    expected = backbone_scores(out)
    code, out, err = ssl_run(f"solver=closed_form projector.K=8 init_weights={exported} {small}")
    assert (code, err) == (0, "")
    assert backbone_scores(out) == expected
    code, _, err = ssl_run(f"solver=closed_form backbone.widths=[8,8] init_weights={exported} {SMALL}")
    assert code == 1
    assert "found those for backbone.widths=[8,16]; set backbone.widths=[8,16]" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("side", "ridge", "number"), [(4, 0.0, 0), (8, 0.0, 1), (8, 0.1, 0)])
def test_closed_form_warns_of_fewer_images_than_features(side: int, ridge: float, number: int) -> None:
    """60 images, and 48 or 192 features."""
    model = SSLModel(linear(3, side, 5), nn.Identity())
    parts = {"model": model, "loss": VICReg(), "loader": noise_loader(), "relation": builders.FromViews()}
    lines = ClosedForm(**parts, passes=1, ridge=ridge).warnings()
    assert len(lines) == number
    assert all("60 images for 192 features" in line and "solver.ridge=0.1" in line for line in lines)


def backbone_scores(out: str) -> list[str]:
    return [row["top1"] for row in table(run_folder(out) / "probe.csv") if row["features"] == "backbone"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 8 of 1000 pairs of a batch."""
    path = tmp_path_factory.mktemp("relation") / "pairs.csv"
    pairs = np.random.default_rng(0).integers(0, 5000, (100_000, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    np.savetxt(path, pairs, fmt="%d", delimiter=",", header="i,j", comments="")
    return path


@pytest.mark.parametrize(
    ("relation", "normalized"),
    [
        ("neighbors", "true"),
        pytest.param("neighbors", "false", marks=pytest.mark.slow),
        ("neighbors relation.queue=64", "false"),
        pytest.param("neighbors relation.queue=64", "true", marks=pytest.mark.slow),
        ("noisy", "true"),
        pytest.param("noisy", "false", marks=pytest.mark.slow),
        ("noisy relation@relation.base=views", "false"),
        pytest.param("noisy relation@relation.base=views", "true", marks=pytest.mark.slow),
        ("edges relation.path='{pairs}'", "true"),
        pytest.param("edges relation.path='{pairs}'", "false", marks=pytest.mark.slow),
    ],
)
def test_every_relation_trains(ssl_run, pairs: Path, relation: str, normalized: str) -> None:
    tiny = "backbone.widths=[8,16] projector.width=16 projector.K=8 probe.every=0"
    settings = f"relation.normalized={normalized} {tiny} {SMALL}"
    code, out, err = ssl_run(f"relation={relation.format(pairs=pairs)} {settings}")
    assert (code, err) == (0, "")
    rows = table(run_folder(out) / "metrics.csv")
    assert len(rows) == 2
    assert all(
        np.isfinite(float(row[name])) for row in rows for name in ("loss", "optimum_loss", "alignment")
    )
    if relation.startswith("edges"):
        assert json.loads((run_folder(out) / "run.json").read_text())["relation"]["pairs"] > 100
        _, out, _ = ssl_run(f"relation=views {settings}")
        assert table(run_folder(out) / "metrics.csv")[0]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize(
    "relation",
    ["neighbors", "noisy", "noisy relation@relation.base=views", "edges relation.path='{pairs}'"],
)
def test_every_relation_within_a_batch_has_closed_form(ssl_run, pairs: Path, relation: str) -> None:
    relation = relation.format(pairs=pairs)
    code, _, err = ssl_run(f"solver=closed_form relation={relation} backbone=linear backbone.width=8 {SMALL}")
    assert (code, err) == (0, "")


def test_queue_has_no_closed_form(ssl_run) -> None:
    code, _, err = ssl_run(f"solver=closed_form backbone=linear relation=neighbors relation.queue=64 {SMALL}")
    assert code == 1
    assert err == "solver=closed_form needs positive pairs within one batch; set relation.queue=0\n"


def test_diagnostics_columns_are_empty_in_other_epochs(ssl_run) -> None:
    tiny = "backbone.widths=[8,16] projector.width=16 projector.K=8"
    _, out, _ = ssl_run(f"{tiny} {SMALL} epochs=3 diagnostics.every=2")
    rows = table(run_folder(out) / "metrics.csv")
    assert [bool(row["rank"]) for row in rows] == [False, True, True]
    _, out, _ = ssl_run(f"{tiny} {SMALL} diagnostics.every=0")
    assert "rank" not in table(run_folder(out) / "metrics.csv")[0]
    assert not (run_folder(out) / "spectrum.csv").exists()


def closed_form(loss: Loss, relation: builders.RelationBuilder, width: int = 4) -> ClosedForm:
    loader = noise_loader(Augment({"all": {"crop": {"scale": [0.5, 1.0]}}}))
    relation.bind(loader.data.pretrain.labels)
    return ClosedForm(SSLModel(LinearBackbone(48, width), nn.Identity()), loss, loader, relation, passes=1)


def all_views(solver: ClosedForm) -> tuple[torch.Tensor, torch.Tensor]:
    """The views that the solver streams, all in one batch (N, 48), and the labels (n,) of their images.

    The view generator of the solver's loader has advanced; a new one with the same seed draws the same views.
    """
    loader = solver.loader
    data, mean, std = loader.data.pretrain, loader.data.mean, loader.data.std
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    order = order[: len(order) // loader.batch_size * loader.batch_size]
    generator = torch.Generator().manual_seed(0)
    X = loader.augment(data.images[data.indices[order]], 2, mean, std, generator)
    return X, data.y[order]


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
def test_reported_loss_is_that_of_all_rows_in_one_batch(
    loss: Loss, relation: builders.RelationBuilder
) -> None:
    """Positive pairs of views lie within batches; those of labels span all batches."""
    fitted = closed_form(loss, relation)
    [row] = fitted.epochs()
    X, labels = all_views(fitted)
    G = (
        Views(len(labels), 2)
        if isinstance(relation, builders.FromViews)
        else Labels(labels.repeat(2), normalized=relation.normalized)
    )
    with torch.no_grad():
        Z = fitted.model.backbone(X)
    assert Z.mean(0).abs().max() <= 1e-4 * Z.abs().max() or loss.center is False
    assert_close(float(loss(Z.double(), G)), row["loss"], rtol=1e-4, atol=1e-4)


def test_barlow_on_labels_is_linear_discriminant_analysis() -> None:
    fitted = closed_form(BarlowTwins(), builders.FromLabels(), width=2)
    list(fitted.epochs())
    X, labels = all_views(fitted)
    theirs = LinearDiscriminantAnalysis(solver="svd").fit(
        X.flatten(1).double().numpy(), labels.repeat(2).numpy()
    )
    Q, P = (
        torch.linalg.qr(M)[0]
        for M in (
            fitted.model.backbone.body[1].weight.detach().T.double(),
            torch.from_numpy(theirs.scalings_),
        )
    )
    classes = len(fitted.loader.data.classes)
    assert torch.linalg.svdvals(Q[:, : classes - 1].T @ P[:, : classes - 1]).min() > 1 - 1e-3


@pytest.mark.parametrize(
    "loss",
    [SimCLR(), VICReg(variance="squared", beta=25.0), SpectralContrastive()],
    ids=lambda x: type(x).__name__,
)
def test_no_other_matrix_has_lower_loss_on_the_same_moments(loss: Loss) -> None:
    fitted = closed_form(loss, builders.FromViews())
    [row] = fitted.epochs()
    assert row["loss_kind"] == "exact"
    again = closed_form(loss, builders.FromViews())
    moments = stream_moments(nn.Flatten(), 48, again.loader, again.relation, passes=1).centred()
    scored = SpectralContrastive(center=True) if isinstance(loss, SimCLR) else loss  # SimCLR's surrogate
    matrix = fitted.model.backbone.body[1]
    W, bias = matrix.weight.detach().double().T, matrix.bias.detach().double()
    reached = value_of(scored, moments.transform(W, moments.mean @ W + bias))
    assert_close(reached, row["loss"], rtol=1e-5, atol=1e-5)
    for size in (1e-3, 1e-1, 1.0):
        other, shift = (
            W + size * torch.randn(W.shape).double(),
            bias + size * torch.randn(bias.shape).double(),
        )
        assert value_of(scored, moments.transform(other, moments.mean @ other + shift)) > row["loss"]


def test_moments_gap_is_zero_for_the_solution_and_positive_otherwise() -> None:
    fitted = closed_form(SimCLR(), builders.FromViews())
    [row] = fitted.epochs()
    gap = MomentsGap(fitted.loader, fitted.relation, fitted.loss, Path(), passes=1)
    gap.check(fitted.model)
    values = gap(fitted.model, epoch=1, last=True)
    assert tuple(values) == MomentsGap.columns
    assert values["moments_closed_form_kind"] == "exact"
    assert_close(values["moments_closed_form"], row["loss"])
    assert_close(values["moments_loss"], row["loss"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        fitted.model.backbone.body[1].weight.normal_()
    assert gap.evaluate(fitted.model, epoch=1)["moments_loss"] > row["loss"]


def test_moments_gap_leaves_views_and_relation_of_training_unchanged() -> None:
    undisturbed, _ = next(noise_loader().batches(0))
    loader, relation = noise_loader(), builders.Rewired(builders.FromViews())
    relation.bind(loader.data.pretrain.labels)
    state = relation.state_dict()["generator"]
    gap = MomentsGap(loader, relation, VICReg(), Path(), passes=2)
    gap.check(SSLModel(linear(3, 4, 5), nn.Identity()))
    assert torch.equal(next(loader.batches(0))[0], undisturbed)
    assert torch.equal(relation.state_dict()["generator"], state)


def test_resumed_closed_form_keeps_its_solution() -> None:
    first, second = (closed_form(BarlowTwins(), builders.FromViews()) for _ in range(2))
    rows = list(first.epochs())
    second.load_state_dict(first.state_dict())
    second.loader = None  # nothing is solved again
    assert list(second.epochs()) == rows
    assert torch.equal(second.model.backbone.body[1].weight, first.model.backbone.body[1].weight)


def test_moments_do_not_depend_on_batch_size_for_labels() -> None:
    """The augmentation is empty, since views are drawn per batch."""
    moments = []
    for batch_size in (20, 30):
        loader, relation = (
            noise_loader(Augment({"all": {}}), batch_size=batch_size),
            builders.FromLabels(True),
        )
        relation.bind(loader.data.pretrain.labels)
        assert loader.steps_per_epoch * batch_size == 60
        moments.append(stream_moments(nn.Flatten(), 48, loader, relation, passes=1).centred())
    first, second = moments
    for name in ("mean", "XHX", "XGX", "XDX"):
        assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-3)


def test_split_linear_layer_returns_the_linear_layer_to_solve_for() -> None:
    linear = LinearBackbone(48, 4)
    flatten, matrix = split_linear_layer(SSLModel(linear, nn.Identity()))
    assert isinstance(flatten, nn.Flatten)
    assert matrix is linear.body[1]
    head = nn.Linear(4, 3)
    assert split_linear_layer(SSLModel(linear, head)) == (linear, head)


def test_model_without_linear_layer_is_rejected() -> None:
    model = SSLModel(Backbone(nn.Flatten(), 48), nn.Sequential())
    with pytest.raises(UsageError, match="solves for one linear layer"):
        split_linear_layer(model)


@pytest.mark.parametrize(
    "loss",
    [VICReg(), SimCLR(), SpectralContrastive(center=True), BarlowTwins()],
    ids=lambda x: type(x).__name__,
)
def test_constant_features_are_rejected(loss: Loss) -> None:
    fitted = closed_form(loss, builders.FromViews())
    fitted.loader.data.pretrain.images.fill_(7)
    with pytest.raises(UsageError, match="all features are constant"):
        list(fitted.epochs())


def test_moments_gap_rejects_nonlinear_model_before_training() -> None:
    loader = noise_loader()
    gap = MomentsGap(loader, builders.FromViews(), VICReg(), Path(), passes=1)
    with pytest.raises(UsageError, match="use backbone=linear projector=identity"):
        gap.check(SSLModel(linear(3, 4, 5), nn.Linear(5, 5)))
