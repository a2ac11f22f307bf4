"""A map of the trained features in two dimensions, and the nearest training images of a few test images.

matplotlib, scikit-learn's manifold module and umap are imported where they are used, since they load slowly.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from ssl_runner import distributed
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.images import Images
from ssl_runner.data.splits import balanced_order
from ssl_runner.errors import counted
from ssl_runner.probe import extract
from ssl_runner.runs.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUERIES, NEIGHBORS = 8, 5  # rows of neighbors.png, and neighbours in each row
MAX_CANDIDATES = 10_000  # training images among which neighbours are searched
MAX_NAMED = 20  # classes with a legend entry each
SPLITS = {"test": "test", "val": "validation", "pretrain": "pretraining"}  # in order of preference
UNLABELED = "#5c5f66"
SAME, OTHER = "#009e73", "#d55e00"  # frames of neighbours with the label of the query, and with another one


def write_map(
    network: nn.Module, data: DataSet, folder: Path, method: str = "pca", images: int = 2000, seed: int = 0
) -> None:
    """Write embedding.png, embedding.csv and neighbors.png to `folder`.

    The map shows up to `images` test images, class-balanced; validation images if there is no test split, and
    pretraining images if there is no validation split either. `method` is "pca", "tsne" or "umap". `seed`
    selects the images and initialises t-SNE and UMAP; the global random states are not used.

    Every rank calls this, since the features are computed by all ranks. The main process writes the files.
    """
    split = next(name for name in SPLITS if len(getattr(data, name)))
    shown = choose(data.evaluation(split), images, seed)
    candidates = choose(data.evaluation("train" if len(data.train) else "pretrain"), MAX_CANDIDATES, seed)
    X, X_candidates = (extract(network, part, data.mean, data.std).cpu() for part in (shown, candidates))
    if not distributed.is_main_process():
        return
    labels = shown.y.cpu().numpy()
    xy, axis_labels = project(X.double().numpy(), method, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from"
        )  # class names in letters that the font lacks
        title = counted(len(shown), f"{SPLITS[split]} image")
        save(scatter(xy, labels, data.classes, axis_labels, title), folder / "embedding.png")
        first = first_of_each_class(labels, QUERIES)
        queries = subset(shown, first)
        neighbors = nearest(X[first], X_candidates, queries.indices, candidates.indices, NEIGHBORS)
        save(sheet(queries, candidates, neighbors, data.classes), folder / "neighbors.png")
    names = [data.classes[label] if label >= 0 else None for label in labels]
    columns = {"index": shown.indices.numpy(), "label": names, "x": xy[:, 0], "y": xy[:, 1]}
    with atomic_write(folder / "embedding.csv") as file:
        file.write(pd.DataFrame(columns).to_csv(index=False).encode(errors="replace"))


def choose(images: Images, most: int, seed: int) -> Images:
    """Up to `most` of the images, class-balanced and in ascending order."""
    return subset(images, np.sort(balanced_order(images.y.cpu().numpy(), seed)[:most]))


def subset(images: Images, positions: np.ndarray) -> Images:
    """The images at positions (m,) within a split."""
    return replace(images, indices=images.indices[torch.from_numpy(positions)])


def first_of_each_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Up to `number` positions in labels (n,): the first of each class, by class, then the second ones."""
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    return np.lexsort((labels, turn))[:number]


def project(X: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Coordinates (n, 2) of features X (n, d), float64, and the labels of the two axes.

    t-SNE and UMAP start from the principal components. With too few images for them, PCA is used instead.
    """
    components, shares = principal_components(X)
    n = len(X)
    start = 10 * components / (np.abs(components).max() or 1)
    if method == "tsne" and n > 3:
        from sklearn.manifold import TSNE

        tsne = TSNE(init=1e-5 * start, perplexity=min(30, (n - 1) / 3), random_state=seed, n_jobs=1)
        return tsne.fit_transform(X).astype(float), ("t-SNE 1", "t-SNE 2")
    if method == "umap" and n > 3:
        from umap import UMAP

        umap = UMAP(init=start, n_neighbors=min(15, n - 1), random_state=seed, n_jobs=1)
        return np.asarray(umap.fit_transform(X), float), ("UMAP 1", "UMAP 2")
    first, second = (
        f"PC {k} ({share:.0%} of variance)".replace("%", " %") for k, share in enumerate(shares, 1)
    )
    return components, (first, second)


def principal_components(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components (n, 2) of X (n, d), and their shares (2,) of the variance.

    The entry of each axis with the largest magnitude is positive. For d = 1 the second component is 0.
    """
    X = X - X.mean(0)
    covariance, d = X.T @ X / len(X), X.shape[1]
    values, axes = scipy.linalg.eigh(covariance, subset_by_index=[max(d - 2, 0), d - 1])
    values, axes = values[::-1].clip(min=0), axes[:, ::-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)
    shares = values / (covariance.trace() or 1)
    missing = 2 - len(values)
    return np.pad(X @ axes, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def nearest(
    X: torch.Tensor, X_candidates: torch.Tensor, indices: torch.Tensor, candidates: torch.Tensor, k: int
) -> np.ndarray:
    """Positions (m, k) of the k nearest candidates of each image by cosine similarity, nearest first.

    X (m, d) and X_candidates (n, d) are features, indices (m,) and candidates (n,) are the indices of their
    images in the data set. An image is never its own neighbour: k is at most n - 1.
    """
    similarity = F.normalize(X, dim=1) @ F.normalize(X_candidates, dim=1).T
    similarity[indices[:, None] == candidates] = -torch.inf
    return similarity.topk(min(k, len(candidates) - 1)).indices.numpy()


def scatter(
    xy: np.ndarray, labels: np.ndarray, classes: Sequence[str], axis_labels: tuple[str, str], title: str
) -> "Figure":
    """Scatter plot of xy (n, 2), coloured by labels (n,), -1 if unlabelled. Up to 20 classes get a legend."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5))
    ax: Axes = figure.add_axes((0.1, 0.1, 0.65, 0.83))
    labelled = sorted(set(labels[labels >= 0].tolist()))
    order = np.random.default_rng(0).permutation(len(xy))  # so that no class hides the others
    order = order[np.argsort(labels[order] >= 0, kind="stable")]  # unlabelled images below
    palette = np.tile(matplotlib.colors.to_rgba(UNLABELED), (len(classes) + 1, 1))  # the last row: label -1
    few = len(labelled) <= MAX_NAMED
    steps = np.linspace(0, 1, len(labelled))
    palette[labelled] = (
        matplotlib.colormaps["tab10" if len(labelled) <= 10 else "tab20"](np.arange(len(labelled)))
        if few
        else matplotlib.colormaps["turbo"](steps)
    )
    ax.scatter(xy[order, 0], xy[order, 1], c=palette[labels[order]], s=8, alpha=0.7, linewidths=0)
    if labelled and not few:
        title += f", coloured by class ({len(labelled)} classes, not named)"
    elif labelled:
        names = [shorten(classes[label]) for label in labelled]
        handles = [ax.scatter([], [], color=palette[label], s=30) for label in labelled]
        legend = figure.legend(
            handles, list(map(str, labelled)), loc="upper left", bbox_to_anchor=(0.76, 0.95)
        )
        legend.set_frame_on(False)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set(text=name, parse_math=False)  # set afterwards: a leading underscore would hide the entry
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1], title=title)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def sheet(queries: Images, candidates: Images, neighbors: np.ndarray, classes: Sequence[str]) -> "Figure":
    """One row per query: the image, then its neighbours (m, k), positions among the candidates.

    Each image is captioned with its class. The frame of a neighbour is green if it has the class of the query
    and orange otherwise; without labels there are no frames.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    m, k = neighbors.shape
    width, height = k + 1.3, 1.15 * m + 0.5  # inches, and units of the axes
    figure = Figure(figsize=(width, height))
    ax: Axes = figure.add_axes((0, 0, 1, 1))
    y, y_candidates = queries.y.tolist(), candidates.y.tolist()
    for row in range(m):
        cells = [(pixels(queries, row), y[row], "none")]
        for position in neighbors[row].tolist():
            label = y_candidates[position]
            colour = "none" if y[row] < 0 or label < 0 else SAME if label == y[row] else OTHER
            cells.append((pixels(candidates, position), label, colour))
        for column, (image, label, colour) in enumerate(cells):
            left, top = column + 0.25 * (column > 0), 1.15 * row
            ax.imshow(image, extent=(left, left + 0.94, top + 0.94, top), cmap="gray", vmin=0, vmax=255)
            ax.add_patch(Rectangle((left, top), 0.94, 0.94, fill=False, edgecolor=colour, linewidth=3))
            name = shorten(classes[label], 14) if label >= 0 else ""
            ax.text(left + 0.47, top + 0.95, name, ha="center", va="top", fontsize=8, parse_math=False)
    title = "Images (left) and their nearest training images"
    if any(label >= 0 for label in y):
        title += "\ngreen frame: same class, orange frame: another class"
    ax.text(width / 2 - 0.05, -0.08, title, ha="center", va="bottom")
    ax.set(xlim=(-0.05, width - 0.05), ylim=(height - 0.45, -0.45))
    ax.set_axis_off()
    return figure


def pixels(images: Images, position: int) -> np.ndarray:
    """Pixels of one image, (H, W, 3) uint8, or (H, W) for any other number of channels, their mean."""
    index = int(images.indices[position])
    image = images.images[index : index + 1]
    image = (image if images.transform is None else images.transform(image))[0].cpu()
    return image.permute(1, 2, 0).numpy() if len(image) == 3 else image.float().mean(0).numpy()


def shorten(text: str, longest: int = 24) -> str:
    """The text on one line that fonts can draw, with an ellipsis after `longest` characters."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
