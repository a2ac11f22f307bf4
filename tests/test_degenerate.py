"""Shapes with which training would learn nothing or fail are refused or reported before it."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssl_runner.backbone import Backbone
from ssl_runner.batch import Batch
from ssl_runner.config.training import check_training
from ssl_runner.degenerate import check_features, check_gradient, check_pairs, warnings
from ssl_runner.errors import UsageError, one_line
from ssl_runner.loss import MMCR, WMSE, BarlowTwins, FroSSL, Loss, SimCLR, SpectralContrastive, VICReg
from ssl_runner.relation import Edges, Relation
from ssl_runner.relation.builders import FromEdges, FromLabels, FromNeighbors, FromViews, RelationBuilder
from tests.helpers import load, toy

TRAINS, SOLVES = "ssl_runner.train.Pretraining", "ssl_runner.theory.solver.ClosedForm"


def shape(batch_size: int = 8, V: int = 2, betas: object = None, solver: str = TRAINS):
    optimizer = {} if betas is None else {"betas": betas}
    options = {"batch_size": batch_size, "V": V, "optimizer": optimizer, "projector": {"K": 256}}
    return OmegaConf.create({**options, "solver": {"_target_": solver}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size=1: expected 2 or more"),
        ({"batch_size": 1, "V": 8}, "batch_size=1: expected 2 or more"),
        *(
            (
                {"betas": betas},
                f"optimizer.betas={text}: expected two numbers from 0 to 1",
            )
            for betas, text in [
                ([], "[]"),
                ([0.9], "[0.9]"),
                ([0.9, 0.99, 0.999], "[0.9,0.99,0.999]"),
                ([0.9, 1.5], "[0.9,1.5]"),
                ([-0.1, 0.9], "[-0.1,0.9]"),
                ([0.9, None], "[0.9,null]"),
                (["a", "b"], "[a,b]"),
                ([True, 0.9], "[true,0.9]"),
                ([[0.9], 0.9], "[[0.9],0.9]"),
                (0.9, "0.9"),
            ]
        ),
    ],
)
def test_options_that_cannot_train_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_training(shape(**options))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "options", [{"batch_size": 2}, {"betas": [0, 0.9]}, {"batch_size": 1, "solver": SOLVES}]
)
def test_options_that_train_are_accepted(options: dict) -> None:
    check_training(shape(**options))


class OfPairs(RelationBuilder):
    """The relation of the pairs of rows in `pairs`, without the views of an image."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs

    def __call__(self, batch: Batch, Z: Tensor) -> Relation:
        i, j = torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2).T
        return Edges(i, j, len(Z))


def edges(tmp_path: Path, *pairs: tuple[int, int]) -> FromEdges:
    (tmp_path / "pairs.csv").write_text("i,j\n" + "".join(f"{i},{j}\n" for i, j in pairs))
    return FromEdges(str(tmp_path / "pairs.csv"))


ONE_COLUMN = "projector.K=1: expected 2 or more columns"
ALL_POSITIVE = "expected negatives in a batch, but this relation makes positives of all its rows"


@pytest.mark.parametrize(
    ("relation", "batch_size", "V", "classes", "message"),
    [
        (FromViews(), 1, 2, 4, ALL_POSITIVE),
        (FromViews(normalized=True), 1, 3, 4, ALL_POSITIVE),
        (FromViews(), 2, 2, 4, None),
        (FromLabels(), 8, 2, 1, ALL_POSITIVE),
        (FromLabels(normalized=True), 8, 2, 1, ALL_POSITIVE),
        (FromLabels(), 2, 2, 2, None),
        (FromNeighbors(1), 2, 2, 4, ALL_POSITIVE),
        (FromNeighbors(7, normalized=True), 8, 3, 4, ALL_POSITIVE),
        (FromNeighbors(3), 8, 2, 4, None),
        (FromNeighbors(7, queue=20), 8, 2, 4, None),
        (OfPairs([]), 4, 2, 4, "expected positives in a batch, but this relation has none"),
        (OfPairs([(0, 1)]), 4, 2, 4, None),
        (OfPairs([(0, j) for j in range(1, 8)]), 4, 2, 4, None),  # the first row only has no negatives
        (OfPairs([(i, j) for i in range(8) for j in range(i)]), 4, 2, 4, ALL_POSITIVE),
    ],
)
def test_relation_without_positives_or_negatives_is_refused(
    relation: RelationBuilder, batch_size: int, V: int, classes: int, message: str | None
) -> None:
    data = load(toy(per_class=10, classes=classes))
    relation.bind(data.pretrain.labels)
    if message is None:
        check_pairs(shape(batch_size, V), relation, data, 3)
        return
    with pytest.raises(UsageError) as error:
        check_pairs(shape(batch_size, V), relation, data, 3)
    assert str(error.value).startswith(f"batch_size={batch_size}: {message}")


@pytest.mark.parametrize(
    ("loss", "K", "message"),
    [
        *((loss, 1, ONE_COLUMN) for loss in (SimCLR(), FroSSL(), MMCR(), WMSE())),
        (SimCLR(tau=0.01, reduction="sum"), 1, ONE_COLUMN),
        (VICReg(0, 0, 0), 8, "loss: expected a weight above 0"),
        (VICReg(0, 1, 0), 1, ONE_COLUMN),
        (WMSE(whitening_size=2), 1, "loss: expected a weight above 0"),  # it accepts no other K
        *((loss, 2, None) for loss in (SimCLR(), FroSSL(), MMCR(), WMSE(), BarlowTwins(), VICReg())),
        *((loss, 1, None) for loss in (SpectralContrastive(), BarlowTwins(), VICReg())),
        (VICReg(0, 0, 1), 1000, None),
    ],
)
def test_loss_without_gradient_is_refused(loss: Loss, K: int, message: str | None) -> None:
    before = torch.get_rng_state()
    if message is None:
        check_gradient(shape(128), loss, K)
    else:
        with pytest.raises(UsageError) as error:
            check_gradient(shape(128), loss, K)
        assert str(error.value).startswith(f"{message}, because the gradient of {type(loss).__name__} is 0")
    assert torch.get_rng_state().equal(before)


def test_w_mse_of_one_row_more_than_columns_has_no_gradient() -> None:
    """K + 1 whitened rows are the corners of a regular simplex, whatever Z is."""
    with pytest.raises(UsageError, match="batch_size=2: expected more images, because the gradient of WMSE"):
        check_gradient(shape(2), WMSE(), 3)


class Zero(Loss):
    """|Z|^2, and a term that is 0 for these options."""

    __module__ = "ssl_runner.loss.zero"

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"norm": 1.0, "zero": 2.0}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return {"norm": Z.square().sum(), "zero": 0 * Z.sum()}


@pytest.mark.parametrize(
    ("loss", "K", "reasons"),
    [
        (VICReg(), 1, [(ONE_COLUMN, "VICReg's covariance", "use more columns")]),
        (BarlowTwins(), 1, [(ONE_COLUMN, "BarlowTwins's off_diagonal", "use more columns")]),
        (Zero(), 2, [("loss: expected terms with a gradient", "Zero's zero", "set its weight to 0")]),
        (VICReg(beta=0), 1, []),
        (VICReg(), 2, []),
        (SpectralContrastive(), 1, []),
    ],
)
def test_term_without_gradient_is_reported(loss: Loss, K: int, reasons: list[tuple[str, str, str]]) -> None:
    assert warnings(shape(), loss, FromViews(), load(toy()), K) == [
        f"warning: {fault}, because the gradient of {what} is 0 for any Z; {remedy}"
        for fault, what, remedy in reasons
    ]


def test_term_without_gradient_in_a_small_batch_is_reported() -> None:
    """K + 1 whitened rows: see above."""
    [line] = warnings(shape(2), WMSE(), FromViews(), load(toy()), 3)
    assert line.startswith("warning: batch_size=2: expected more images, because the gradient of WMSE's")


def test_loss_without_projector_names_the_width_of_the_backbone() -> None:
    cfg = shape(128)
    cfg.projector = {}
    with pytest.raises(UsageError, match=r"^backbone\.width=1: expected 2 or more columns"):
        check_gradient(cfg, SimCLR(), 1)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(2, 1 * 2 / (60 * 59)), (8, 56 / (60 * 59)), (60, None)],
)
def test_batches_with_few_pairs_of_a_file_are_reported(
    tmp_path: Path, batch_size: int, expected: float | None
) -> None:
    data = load(toy())
    i, j = data.pretrain.indices[[3, 40]].tolist()
    relation = edges(tmp_path, (i, j))
    relation.bind(data.pretrain.labels)
    lines = warnings(shape(batch_size), VICReg(), relation, data, 2)
    assert len(lines) == (expected is not None)
    assert all(f"on average {expected:.2g} pairs of images" in line for line in lines)


def test_expected_pairs_of_labels_are_the_mean_over_batches() -> None:
    data, size = load(toy(per_class=6, classes=20)), 4
    [line] = warnings(shape(size), VICReg(), FromLabels(), data, 2)
    y = data.pretrain.y
    batches = [y[torch.randperm(len(y))[:size]] for _ in range(3_000)]
    pairs = sum(int((labels[:, None] == labels).sum()) - size for labels in batches) / 2 / len(batches)
    assert float(line.split("average ")[1].split()[0]) == pytest.approx(pairs, rel=0.15)


class Returns(Backbone):
    """A custom backbone that returns `of` the maps (B, 4, 6, 6)."""

    def __init__(self, of) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), 4)
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.body(x))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda y: y, "expected features of shape (rows, 4), found (1, 4, 6, 6) for one image"),
        (lambda y: y.flatten(2), "found (1, 4, 36)"),
        (lambda y: y.mean((0, 2, 3)), "found (4,)"),
        (lambda y: [y], "found list for one image"),
        (lambda y: (y, y), "found tuple for one image"),
        (lambda y: {"x": y}, "found dict for one image"),
        (lambda y: None, "found NoneType for one image"),
        (lambda y: y @ y.new_zeros(5, 5), "for images of shape (3, 8, 8), but it raises 'mat1 and mat2"),
        (lambda y: y.view(7), "but it raises 'shape '[7]' is invalid for input of size 144'"),
        (lambda y: y.mean((2, 3)), None),
        (lambda y: y.mean((2, 3), keepdim=True), None),
    ],
)
def test_backbone_without_a_vector_of_features_is_refused(of, message: str | None) -> None:
    backbone, data = Returns(of), load(toy(side=8))
    if message is None:
        check_features(backbone, data)
        assert backbone.training
        return
    with pytest.raises(UsageError, match=r"^backbone: expected") as error:
        check_features(backbone, data)
    assert message in str(error.value)


def test_failed_allocation_is_one_line_with_its_size() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    assert one_line(error.value).startswith("out of memory for 1.05e+06 GiB; use a smaller batch_size")
