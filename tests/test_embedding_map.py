"""The map of the embedding and the nearest neighbours, compared with numpy and with loops."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ssl_runner import embedding_map
from ssl_runner.data.dataset import DataSet, Source
from tests.helpers import TINY, load, run_folder, toy

FILES = ("embedding.csv", "embedding.png", "neighbors.png")


def noise(**sizes: int) -> Source:
    """Return the toy data set with random pixels."""
    source, generator = toy(**sizes), torch.Generator().manual_seed(0)
    source.images = torch.randint(0, 256, source.images.shape, generator=generator, dtype=torch.uint8)
    return source


def unlabeled() -> DataSet:
    """Return a data set without labels and classes, whose only images are those to pretrain on."""
    data = load(noise())
    labels = torch.full_like(data.train.labels, -1)
    empty = torch.empty(0, dtype=torch.int64)
    none = replace(data.train, labels=labels, indices=empty)
    pretrain = replace(data.pretrain, labels=labels)
    return replace(data, classes=[], pretrain=pretrain, train=none, val=none, test=none)


def test_principal_components_match_svd() -> None:
    X = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8) + 3
    components, shares = embedding_map.principal_components(X)
    U, s, _ = np.linalg.svd(X - X.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(components), np.abs(U * s)[:, :2], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:2])
    np.testing.assert_allclose(embedding_map.principal_components(X + 5)[0], components, atol=1e-9)


@pytest.mark.parametrize("X", [np.ones((6, 3)), np.arange(6.0)[:, None], np.ones((1, 4))])
def test_principal_components_of_degenerate_features_are_finite(X: np.ndarray) -> None:
    components, shares = embedding_map.principal_components(X)
    assert components.shape == (len(X), 2)
    assert np.isfinite(components).all()
    assert np.isfinite(shares).all()


def test_nearest_matches_loop_and_excludes_the_image_itself() -> None:
    candidates, X = torch.arange(10, 40), torch.randn(30, 5)
    queries = torch.tensor([3, 0, 17])
    found = embedding_map.nearest(X[queries], X, candidates[queries], candidates, 4)
    for row, query in zip(found, queries.tolist(), strict=True):
        cosine = [float(X[query] @ x / X[query].norm() / x.norm()) for x in X]
        others = sorted((i for i in range(30) if i != query), key=lambda i: -cosine[i])
        assert row.tolist() == others[:4]


def test_nearest_returns_at_most_all_other_images() -> None:
    X, indices = torch.randn(3, 2), torch.arange(3)
    found = embedding_map.nearest(X, X, indices, indices, 5)
    assert [sorted(row) for row in found.tolist()] == [[1, 2], [0, 2], [0, 1]]


def test_first_of_each_class_cycles_through_classes() -> None:
    labels = np.array([2, 2, 0, 1, 0, 2])
    assert embedding_map.first_of_each_class(labels, 5).tolist() == [2, 3, 0, 4, 1]


def test_map_shows_balanced_test_images_with_their_labels(tmp_path: Path) -> None:
    data = load(noise())
    embedding_map.write_map(nn.Flatten(), data, tmp_path, images=6)
    table = pd.read_csv(tmp_path / "embedding.csv")
    assert list(table) == ["index", "label", "x", "y"]
    assert set(table["index"]) <= set(data.test.indices.tolist())
    assert list(table.label) == data.test.labels[list(table["index"])].tolist()
    assert sorted(table.label.value_counts()) == [1, 1, 2, 2]
    X = (data.test.images[list(table["index"])] / 255 - data.mean[:, None, None]) / data.std[:, None, None]
    expected, _ = embedding_map.principal_components(X.flatten(1).double().numpy())
    np.testing.assert_allclose(table[["x", "y"]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data", [unlabeled(), load(noise(unlabeled=5))], ids=["unlabeled", "labeled"])
def test_map_leaves_random_states_and_training_mode_unchanged(data: DataSet, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 6), nn.BatchNorm1d(6))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    embedding_map.write_map(network, data, tmp_path)
    assert_close(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert all(module.training for module in network.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == list(FILES)


def test_map_without_labels_shows_pretraining_images_in_one_colour(tmp_path: Path) -> None:
    data = unlabeled()
    embedding_map.write_map(nn.Flatten(), data, tmp_path)
    table = pd.read_csv(tmp_path / "embedding.csv")
    assert table.label.isna().all()
    assert list(table["index"]) == data.pretrain.indices.tolist()
    labels = np.full(len(table), -1)
    figure = embedding_map.scatter(table[["x", "y"]].to_numpy(), labels, [], ("x", "y"), "title")
    [points] = figure.axes[0].collections
    assert {tuple(colour[:3]) for colour in points.get_facecolor()} == {to_rgba(embedding_map.UNLABELED)[:3]}
    assert not figure.legends


def test_map_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        embedding_map.write_map(nn.Flatten(), load(noise()), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("classes", "named"), [(3, True), (20, True), (21, False)])
def test_scatter_colours_classes_and_names_up_to_twenty(classes: int, named: bool) -> None:
    labels = np.arange(60) % classes
    names = ["_hidden", "$dollar", "\udce9", *(f"class {i}" for i in range(3, classes))]
    figure = embedding_map.scatter(
        np.random.default_rng(0).normal(size=(60, 2)), labels, names, ("", ""), "t"
    )
    points = figure.axes[0].collections[0]
    assert len(np.unique(points.get_facecolor(), axis=0)) == classes
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert shown == (["_hidden", "$dollar", "?", *names[3:]] if named else [])
    assert figure.axes[0].get_title() == ("t" if named else "t, coloured by class (21 classes, not named)")
    figure.canvas.draw()


def test_sheet_frames_neighbours_by_class() -> None:
    data = load(noise())
    neighbors = np.array([[0, 1], [2, 3]])
    queries = embedding_map.subset(data.test, np.array([0, 1]))
    [ax] = embedding_map.sheet(queries, data.train, neighbors, data.classes).axes
    expected = []
    for query, row in zip(queries.y.tolist(), neighbors, strict=True):
        expected.append(to_rgba("none"))
        same = [data.train.y[position] == query for position in row]
        expected += [to_rgba(embedding_map.SAME if s else embedding_map.OTHER) for s in same]
    assert [patch.get_edgecolor() for patch in ax.patches] == expected
    first = data.test.images[data.test.indices[0]].permute(1, 2, 0)
    np.testing.assert_array_equal(ax.images[0].get_array(), first)


def test_tsne_is_deterministic_and_leaves_random_state_unchanged() -> None:
    X, before = np.random.default_rng(0).normal(size=(8, 5)), np.random.get_state()[1].copy()
    xy, names = embedding_map.project(X, "tsne", seed=3)
    assert names == ("t-SNE 1", "t-SNE 2")
    assert xy.shape == (8, 2)
    np.testing.assert_array_equal(embedding_map.project(X, "tsne", seed=3)[0], xy)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_umap_starts_from_principal_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """Stands for the module umap: returns the coordinates that it starts from."""

        def UMAP(self, init: np.ndarray, n_neighbors: int, random_state: int, n_jobs: int) -> "Fake":
            self.init = init
            assert (n_neighbors, random_state) == (7, 3)
            return self

        def fit_transform(self, X: np.ndarray) -> np.ndarray:
            return self.init

    monkeypatch.setitem(sys.modules, "umap", Fake())
    X = np.random.default_rng(0).normal(size=(8, 5))
    xy, names = embedding_map.project(X, "umap", seed=3)
    assert names == ("UMAP 1", "UMAP 2")
    assert np.abs(xy).max() == pytest.approx(10)
    assert abs(np.corrcoef(xy[:, 0], embedding_map.principal_components(X)[0][:, 0])[0, 1]) == pytest.approx(
        1
    )


def test_umap_that_is_not_installed_is_refused_before_training(ssl_run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert ssl_run(f"{TINY} embedding.method=umap") == (
        1,
        "",
        "embedding.method=umap: expected umap-learn to be installed; run pip install 'ssl_runner[umap]'\n",
    )


def test_run_writes_map_without_changing_its_results(ssl_run) -> None:
    folders = {}
    for method in ("pca", "none"):
        code, out, err = ssl_run(f"{TINY} epochs=1 dataset.subset=100 embedding.method={method}")
        assert (code, err) == (0, "")
        folders[method] = run_folder(out)
    assert [(folders["pca"] / name).exists() for name in FILES] == [True] * 3
    assert [(folders["none"] / name).exists() for name in FILES] == [False] * 3
    table = pd.read_csv(folders["pca"] / "embedding.csv")
    assert len(table) == 1000
    assert sorted(table.label.unique()) == list(range(10))
    for name in ("embedding.png", "neighbors.png"):
        with Image.open(folders["pca"] / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 500
    weights = [(folder / "backbone.safetensors").read_bytes() for folder in folders.values()]
    assert weights[0] == weights[1]
