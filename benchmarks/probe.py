"""Linear probes of 50,000 features of 512 numbers: ours, SGD as the peers do it, scikit-learn."""

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
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.protocol import accuracies, best_of, extract
from ssl_runner.probe.ridge import RidgeProbe

N, D, CLASSES, BATCH, EPOCHS = 50_000, 512, 10, 256, 100
L2 = 10**-3.5  # of the one fit that scikit-learn does as well
RATES = [0.01, 0.1, 1.0]  # of the bare SGD, on standardised features


class Split(NamedTuple):
    """Features (n, d) and labels (n,) of a part of a data set."""

    X: Tensor
    y: Tensor


class Features(NamedTuple):
    """train and val are the first nine tenths and the rest of `both`."""

    work: str
    train: Split
    val: Split
    both: Split
    test: Split


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """Every tool on made-up features; with `full` and `data` also on those of an untrained convnet on these images. The ratio is
    to our linear probe: all of its path, the refit and the test score."""
    rows = compare(made_up(device), device, full)
    if full and data is not None:
        rows += compare(of_images(data, device, out), device, full)
    return rows


def compare(features: Features, device: torch.device, full: bool) -> list[dict[str, Any]]:
    """Rows for all tools. The quick ones take turns; SGD and scikit-learn, minutes each, run once."""
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


# --- features -----------------------------------------------------------------------------------------------------------------


def made_up(device: torch.device) -> Features:
    """A random two-layer network on overlapping Gaussian mixtures: rectified, correlated, ill-conditioned features."""
    torch.manual_seed(0)
    n = N + 10_000
    y = torch.arange(n)[torch.randperm(n)] % CLASSES
    modes = 0.35 * torch.randn(CLASSES, 4, 64)
    inputs = modes[y, torch.randint(4, (n,))] + torch.randn(n, 64) * torch.logspace(0.4, -1, 64)
    inputs *= (0.5 * torch.randn(n, 1)).exp()  # contrast
    first, second = torch.randn(64, 256) / 8, torch.randn(256, D) / 16
    X = ((inputs @ first).relu() @ second).relu().to(device)
    return split(f"{N:,} x {D}, made up", Split(X[:N], y[:N].to(device)), Split(X[N:], y[N:].to(device)))


def of_images(folder: Path, device: torch.device, out: Path) -> Features:
    """Features of an untrained convnet with 512 channels at the end, in the order of the images, shuffled."""
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
    most = len(both.y) * 9 // 10
    return Features(
        work, Split(both.X[:most], both.y[:most]), Split(both.X[most:], both.y[most:]), both, test
    )


# --- contenders: top-1 on the test features, and where they run once their seconds --------------------------------------------


def top1(scores: Tensor, y: Tensor) -> float:
    return accuracies(scores, y)["top1"] or 0.0


def protocol(Probe: type[LinearProbe] | type[RidgeProbe], features: Features) -> float:
    """The penalty chosen on val from a path on train, a fit on both, the score on test: as `ssl_runner.probe.probe` does it."""
    chosen, _ = best_of(Probe(*features.train, CLASSES).path(features.val.X), features.val.y)
    return top1(Probe(*features.both, CLASSES).scores(chosen, features.test.X), features.test.y)


def one_fit(features: Features) -> float:
    return top1(LinearProbe(*features.both, CLASSES).scores(L2, features.test.X), features.test.y)


def sgd(train: Split, test: Split, rate: float, epochs: int) -> tuple[float, float]:
    """Seconds and top-1 of SGD with a cosine schedule, batches of 256 by index from standardised features in memory: no loader,
    no framework, no logging."""
    measure.synchronize(train.X.device)
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
    """Validation top-1 after five epochs, which tells the learning rates apart; with --full it is after all of them."""
    return sgd(features.train, features.val, rate, 5)[1]


def lightly(features: Features, device: torch.device, epochs: int) -> tuple[float, float, float | None, int]:
    """lightly's benchmarks/imagenet/resnet50/linear_eval.py, which says 90 epochs at lr 0.1 with batches of 256 a device, on
    features: seconds of EPOCHS epochs in proportion to those run, top-1, memory, epochs run. A few epochs are a whole short
    schedule, whose top-1 is that of the short one."""
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
    """lbfgs at the objective of our one fit, from standardised float64 features. RuntimeError if the two optima are not one."""
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
        raise RuntimeError(f"our linear probe ends at {reached:.8f}, scikit-learn's at {best:.8f}")
    scores = torch.from_numpy(theirs.decision_function(((features.test.X.double() - mean) * scale).numpy()))
    return seconds, top1(scores, features.test.y), memory, None
