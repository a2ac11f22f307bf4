"""Linear probes on 50,000 feature vectors of dimension 512: ssl_runner, SGD as in lightly, scikit-learn."""

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import measure
from ssl_runner.backbone import convnet
from ssl_runner.data import dataset, image_folder
from ssl_runner.device import synchronize
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.protocol import accuracies, best_of, extract
from ssl_runner.probe.ridge import RidgeProbe

N, D, CLASSES, BATCH, EPOCHS = 50_000, 512, 10, 256, 100
L2 = 10**-3.5  # penalty of the single fit that is compared with scikit-learn
RATES = [0.01, 0.1, 1.0]  # learning rates of the bare SGD, on standardised features


class Split(NamedTuple):
    """Features X (n, d) and labels y (n,) of one split of a data set."""

    X: Tensor
    y: Tensor


class Features(NamedTuple):
    """Features of all splits: `train` is the first 90 % of `both`, and `val` the rest."""

    work: str
    train: Split
    val: Split
    both: Split
    test: Split


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per tool and set of features: work, tool, seconds, ratio, top1, peak_mib, measured_epochs.

    The features are synthetic. With `full` and `data`, features of these images from an untrained convnet are
    added. `ratio` is the time divided by that of our linear probe, which includes the whole path of
    penalties, the refit and the test score.
    """
    rows = compare(made_up(device), device, full)
    if full and data is not None:
        rows += compare(of_images(data, device, out), device, full)
    return rows


def compare(features: Features, device: torch.device, full: bool) -> list[dict[str, Any]]:
    """One row per tool. Our probes take turns; SGD and scikit-learn take minutes each and run once."""
    works: dict[str, Callable[[], float]] = {
        "ours: linear, path and refit": partial(protocol, LinearProbe, features),
        "ours: linear, one fit": partial(one_fit, features),
        "ours: ridge, path and refit": partial(protocol, RidgeProbe, features),
    }
    found: dict[str, float] = {}
    ours: dict[str, measure.Work] = {
        name: partial(lambda name: found.update({name: works[name]()}), name) for name in works
    }
    peak = {name: measure.peak_memory(work, device) for name, work in ours.items()}
    taken = measure.interleaved(ours, device, budget=30 if full else 0, least=3 if full else 2)
    scores: dict[str, tuple[float, float, float | None, int | None]] = {
        name: (taken[name], found[name], peak[name], None) for name in ours
    }
    rate = max(
        RATES,
        key=lambda rate: (
            sgd(features.train, features.val, rate, EPOCHS)[1] if full else quick(features, rate)
        ),
    )
    bare: list[tuple[float, float]] = []
    memory = measure.peak_memory(lambda: bare.append(sgd(features.both, features.test, rate, EPOCHS)), device)
    scores[f"bare SGD in memory, {EPOCHS} epochs, lr={rate:g}"] = (*bare[0], memory, EPOCHS)
    scores[f"lightly LinearClassifier, {EPOCHS} epochs"] = lightly(features, device, EPOCHS if full else 3)
    if device.type == "cpu":
        scores["scikit-learn LogisticRegression, one fit"] = scikit_learn(features)
    reference = taken["ours: linear, path and refit"]
    return [
        {"work": features.work, "tool": tool, "seconds": seconds, "ratio": seconds / reference, "top1": top1}
        | {"peak_mib": mib, "measured_epochs": epochs}
        for tool, (seconds, top1, mib, epochs) in scores.items()
    ]


# --- features ---


def made_up(device: torch.device) -> Features:
    """Synthetic features: overlapping Gaussian mixtures passed through a random two-layer network.

    They are rectified, correlated and ill-conditioned.
    """
    torch.manual_seed(0)
    n = N + 10_000
    y = torch.arange(n)[torch.randperm(n)] % CLASSES
    modes = 0.35 * torch.randn(CLASSES, 4, 64)
    inputs = modes[y, torch.randint(4, (n,))] + torch.randn(n, 64) * torch.logspace(0.4, -1, 64)
    inputs *= (0.5 * torch.randn(n, 1)).exp()  # contrast
    first, second = torch.randn(64, 256) / 8, torch.randn(256, D) / 16
    X = ((inputs @ first).relu() @ second).relu().to(device)
    return split(f"{N:,} x {D}, synthetic", Split(X[:N], y[:N].to(device)), Split(X[N:], y[N:].to(device)))


def of_images(folder: Path, device: torch.device, out: Path) -> Features:
    """Features of the images in `folder` from an untrained convnet with D output channels.

    The training and validation images are concatenated and shuffled.
    """
    read = partial(image_folder.folder, str(folder), None, str(out / "cache"))
    images = dataset.load(read, "folder", 0.1, None, 0, "auto", device)
    torch.manual_seed(0)
    network = convnet(images.channels, images.image_size, (64, 128, D)).to(device)
    parts = {
        name: extract(network, getattr(images, name), images.mean, images.std)
        for name in ("train", "val", "test")
    }
    X, y = torch.cat([parts["train"], parts["val"]]), torch.cat([images.train.y, images.val.y])
    order = torch.randperm(len(X))
    X, y = X[order], y[order]
    return split(f"{len(X):,} x {D}, images", Split(X, y), Split(parts["test"], images.test.y))


def split(work: str, both: Split, test: Split) -> Features:
    """Split `both` into 90 % training and 10 % validation features."""
    most = len(both.y) * 9 // 10
    return Features(
        work, Split(both.X[:most], both.y[:most]), Split(both.X[most:], both.y[most:]), both, test
    )


# --- contenders: each returns its test top-1; those that run only once also return their time ---


def top1(scores: Tensor, y: Tensor) -> float:
    """Top-1 accuracy of scores (n, classes) for labels y (n,)."""
    return accuracies(scores, y)["top1"] or 0.0


def protocol(Probe: type[LinearProbe] | type[RidgeProbe], features: Features) -> float:
    """Test top-1 by the protocol of `ssl_runner.probe.evaluate`.

    The penalty is selected on val from a path fitted on train. The probe is then refitted on both.
    """
    chosen, _ = best_of(Probe(*features.train, CLASSES).path(features.val.X), features.val.y)
    return top1(Probe(*features.both, CLASSES).scores(chosen, features.test.X), features.test.y)


def one_fit(features: Features) -> float:
    """Test top-1 of a single fit with penalty L2."""
    return top1(LinearProbe(*features.both, CLASSES).scores(L2, features.test.X), features.test.y)


def sgd(train: Split, test: Split, rate: float, epochs: int) -> tuple[float, float]:
    """Time (s) and top-1 of SGD with a cosine schedule on standardised features in memory.

    Batches of BATCH rows are indexed directly, without data loader, framework or logging.
    """
    synchronize(train.X.device)
    start = time.perf_counter()
    mean, std = train.X.mean(0), train.X.std(0).clamp(min=1e-6)
    X, y = (train.X - mean) / std, train.y
    torch.manual_seed(0)
    head = nn.Linear(X.shape[1], CLASSES, device=X.device)
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(X) // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(X), device=X.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(X[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        score = top1(head((test.X - mean) / std), test.y)
    return time.perf_counter() - start, score


def quick(features: Features, rate: float) -> float:
    """Validation top-1 after five epochs, which suffices to select the learning rate.

    With --full, the learning rate is selected after all EPOCHS instead.
    """
    return sgd(features.train, features.val, rate, 5)[1]


def lightly(features: Features, device: torch.device, epochs: int) -> tuple[float, float, float | None, int]:
    """Probe of lightly's benchmarks/imagenet/resnet50/linear_eval.py, trained on precomputed features.

    That script uses 90 epochs at lr 0.1 with batches of 256 per device. Returns seconds, extrapolated from
    `epochs` to EPOCHS; top-1; peak memory in MiB; `epochs`. The schedule spans `epochs`, so top-1 is that of
    the shorter schedule.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        from lightly.utils.benchmarking import LinearClassifier
        from pytorch_lightning import Trainer

        X, y = (tensor.cpu() for tensor in features.both)
        torch.manual_seed(0)
        model = LinearClassifier(nn.Identity(), BATCH, feature_dim=X.shape[1], num_classes=CLASSES)
        loader = DataLoader(TensorDataset(X, y), BATCH, shuffle=True, drop_last=True)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = Trainer(
            max_epochs=epochs, accelerator=accelerator, devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        start = time.perf_counter()
        memory = measure.peak_memory(lambda: trainer.fit(model, loader), device)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            score = top1(model.cpu()(features.test.X.cpu()), features.test.y.cpu())
    return seconds * EPOCHS / epochs, score, memory, epochs


def scikit_learn(features: Features) -> tuple[float, float, float | None, None]:
    """L-BFGS on the objective of `one_fit`, with standardised float64 features.

    Returns seconds, top-1, peak memory in MiB, None. Raises RuntimeError if the optimal values differ.
    """
    X, y = features.both
    mean, std = X.double().mean(0), X.double().std(0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    Xs = (X.double() - mean) * scale
    theirs = LogisticRegression(C=1 / (L2 * len(X)), tol=1e-6, max_iter=2000)
    start = time.perf_counter()
    memory = measure.peak_memory(lambda: theirs.fit(Xs.numpy(), y.numpy()), X.device)
    seconds = time.perf_counter() - start
    ours = LinearProbe(X, y, CLASSES)
    ours.fit(L2)

    def objective(W: Tensor, b: Tensor) -> float:
        return float(F.cross_entropy(F.linear(Xs, W, b), y) + L2 / 2 * W.square().sum())

    reached = objective(ours.W.double(), ours.b.double())
    best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_))
    if abs(reached - best) > 1e-5 * best:
        raise RuntimeError(f"objective of our linear probe: {reached:.8f}, of scikit-learn's: {best:.8f}")
    scores = torch.from_numpy(theirs.decision_function(((features.test.X.double() - mean) * scale).numpy()))
    return seconds, top1(scores, features.test.y), memory, None
