"""ssl-relation: the label fit of an augmentation equals that of an explicit augmentation graph."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from ssl_runner.config.compose import CONF, parse
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError
from ssl_runner.evaluation import relation_cli
from ssl_runner.evaluation.finished import check_settable, compose_groups
from ssl_runner.evaluation.relation_fit import RelationFit, variants
from ssl_runner.relation import Views
from ssl_runner.theory.label_fit import EqualViews, LabelFit, label_fit
from ssl_runner.theory.moments import Moments
from ssl_runner.views import Augment
from tests.helpers import CPU, run_script

PAGE = Path(__file__).parent.parent / "docs" / "theory.md"
SMALL = "dataset.subset=300 dataset.size=14 backbone.widths=[8,20] device=cpu"


def fit_of(views: Tensor, clean: Tensor, y: Tensor, K: int, batches: int = 1, **options: float) -> LabelFit:
    """The fit to clean images (m, D) of views (V, n, D), streamed in batches of images."""
    moments = Moments(views.shape[2], CPU)
    for block in views.chunk(batches, 1):
        moments.add(block.flatten(0, 1), Views(block.shape[1], len(views)))
    return label_fit(moments.centred(), clean, y, K, **options)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_label_fit_matches_explicit_augmentation_graph(ridge: float) -> None:
    """Every view is a node of a dense adjacency matrix; energy is the adjusted R2 of least squares."""
    generator = torch.Generator().manual_seed(0)
    V, n, m, D, K = 3, 40, 30, 5, 4
    views = torch.randn(1, n, D, generator=generator) + torch.randn(V, n, D, generator=generator)
    clean, y = torch.randn(m, D, generator=generator), torch.arange(m) % 3
    fit = fit_of(views, clean, y, K, batches=4, ridge=ridge)

    X = (
        views.transpose(0, 1).reshape(n * V, D).double().numpy()
    )  # the views of an image are neighbouring rows
    X = X - X.mean(0)
    A = np.kron(np.eye(n), np.ones((V, V)) - np.eye(V))
    B = X.T @ np.diag(A.sum(1)) @ X
    _, W = scipy.linalg.eigh(X.T @ A @ X, B + ridge * np.trace(B) / D * np.eye(D))
    W = W[:, ::-1][:, :K]
    pairs = [(a, b) for a in range(n * V) for b in range(n * V) if A[a, b]]
    for k in range(K):
        u = X @ W[:, k]
        left, right = (np.array([u[pair[side]] for pair in pairs]) for side in (0, 1))
        assert float(fit.rho[k]) == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-9)
        design = np.column_stack([np.ones(m), clean.double().numpy() @ W[:, : k + 1]])
        targets = np.eye(3)[y.numpy()]
        residual = targets - design @ scipy.linalg.lstsq(design, targets)[0]
        R2 = 1 - np.square(residual).sum() / np.square(targets - targets.mean(0)).sum()
        adjusted = 1 - (1 - R2) * (m - 1) / (m - 2 - k)
        assert float(fit.energy[k]) == pytest.approx(adjusted, abs=1e-9)


def images_of(y: Tensor, nuisance: Tensor) -> Tensor:
    return torch.cat([torch.nn.functional.one_hot(y, 4).float(), nuisance], 1)


@pytest.mark.parametrize("destroyed", ["label", "nuisance"])
def test_energy_depends_on_what_the_augmentation_destroys(destroyed: str) -> None:
    """Features are the class of four and three nuisance variables. Views have one of the two drawn anew."""
    generator = torch.Generator().manual_seed(0)
    V, n = 2, 2000
    y, noise = torch.arange(n) % 4, torch.randn(n, 3, generator=generator)
    if destroyed == "label":
        views = [images_of(torch.randint(4, (n,), generator=generator), noise) for _ in range(V)]
    else:
        views = [images_of(y, torch.randn(n, 3, generator=generator)) for _ in range(V)]
    clean = images_of(y, torch.randn(n, 3, generator=generator))
    fit = fit_of(torch.stack(views), clean, y, 3)
    expected = 0.0 if destroyed == "label" else 1.0
    assert float(fit.energy[-1]) == pytest.approx(expected, abs=0.01)
    assert fit.rho.min() > 0.99


def test_equal_views_have_no_label_fit() -> None:
    X = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1))
    with pytest.raises(EqualViews):
        fit_of(X + noise, X[0], torch.arange(50) % 2, 2)
    fit_of(X + 1e3 * noise, X[0], torch.arange(50) % 2, 2)


def test_variants_leave_out_each_operation_of_every_policy() -> None:
    affine = {"degrees": 15, "translate": 0, "scale": [0.8, 1.2]}
    policies = {
        "a": {"count": 1, "size": 8, "affine": affine, "flip": 0.5},
        "b": {"count": 2, "size": None, "flip": 0.5, "grayscale": 0.0, "jitter": {"p": 0.8, "hue": 0.1}},
    }
    found = variants(policies)
    operations = ["affine.degrees", "affine.scale", "flip", "jitter.hue"]
    names = [f"{kind} {name}" for kind in ("without", "only") for name in operations]
    assert [*found] == ["all operations", *names]
    b = {"count": 2, "size": None}
    assert found["without affine.degrees"]["a"] == {**policies["a"], "affine": {**affine, "degrees": 0}}
    assert found["only flip"] == {"a": {"count": 1, "size": 8, "flip": 0.5}, "b": {**b, "flip": 0.5}}
    assert found["only jitter.hue"] == {
        "a": {"count": 1, "size": 8},
        "b": {**b, "jitter": {"p": 0.8, "hue": 0.1}},
    }
    for variant in found.values():
        assert Augment(variant).total == 3


def test_halves_are_disjoint_training_images_and_views_are_cut_from_stored_images() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL.split(), "dataset.eval_crop=12"])
    fit = RelationFit(cfg, CPU, images=10**6, passes=1)
    first = {*fit.data.pretrain.indices.tolist()}
    train = {*fit.data.train.indices.tolist()}
    assert first < train
    assert len(fit.features) == len(train - first) == len(fit.y)
    torch.testing.assert_close(fit.y.bincount(), fit.data.pretrain.y.bincount(), rtol=0, atol=1)
    assert fit.data.pretrain.transform is None
    assert fit.data.train.transform is not None


@pytest.fixture
def relation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> Callable[[str], tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    return lambda words: run_script(relation_cli.main, shlex.split(words), monkeypatch, capsys)


def test_ssl_relation_writes_equal_tables_and_a_chart(relation: Callable, tmp_path: Path) -> None:
    views = "views=crop +views.policies.all.grayscale=0.5"  # which leaves digits as they are
    code, out, err = relation(f"{SMALL} {views} --passes 1")
    assert (code, err) == (0, "")
    frame = pd.read_csv("relation/relation.csv").set_index("views")
    assert [*frame] == ["energy_9", "energy_18", "area", "rho_9"]
    assert [*frame.index[frame.area.isna()]] == ["only grayscale"]
    kept = frame.drop("only grayscale")
    assert kept.energy_18.between(0.05, 1).all()
    assert kept.rho_9.between(0, 1).all()
    assert frame.area["all operations"] == frame.area["without grayscale"] != frame.area["only crop"]
    assert "-: these operations do not change the images" in out
    assert out.endswith("\nwritten to relation: relation.csv, relation.png\n")
    assert (tmp_path / "relation" / "relation.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = relation(f"{SMALL} {views} --passes 1")
    assert code == 1
    assert "relation.csv: expected a new file" in err
    relation(f"{SMALL} {views} --passes 1 -o again")
    assert Path("again/relation.csv").read_bytes() == Path("relation/relation.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("V=1", "V=1: expected an integer from 2 to 10000"),
        ("views=none", "views: expected policies with at least one operation"),
        ("views=crop loss=simclr", "loss=simclr: expected options of dataset, views"),
        ("views=crop --images 0", "--images=0: expected an integer >= 1"),
        ("views=crop --images 20", "20 labelled images of 10 classes: expected at least 4 per class"),
        ("views=crop views.policies.all.flip=2", "views.policies.all.flip=2: expected"),
        ("views=crop views.resolutions=[14,28]", "views.resolutions"),
        ("views=none +views.policies.all.grayscale=1", "equal views: expected views that differ"),
    ],
)
def test_ssl_relation_rejects_invalid_input_in_one_line(
    words: str, message: str, relation: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    code, _, err = relation(f"{SMALL} --passes 1 {words}")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_commands_of_the_page_are_accepted() -> None:
    lines = [line.strip().partition(" #")[0] for line in PAGE.read_text().splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("ssl-relation ")]
    assert len(commands) >= 3
    for words in commands:
        given = [word for word in words if "FOLDER" not in word]
        args = relation_cli.parser().read(given)
        check_settable(parse(args.overrides), relation_cli.SETTABLE, "")
        compose_groups(args.overrides, None)


def test_data_set_without_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(20)
    none = np.arange(0)
    source = Source(images, torch.full((20,), -1), [], none, none, np.arange(20))
    monkeypatch.setattr("ssl_runner.data.readers.mnist5k", lambda **options: source)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["device=cpu"])
    with pytest.raises(UsageError, match=r"dataset=mnist5k: expected labels"):
        RelationFit(cfg, CPU, images=100, passes=1)
