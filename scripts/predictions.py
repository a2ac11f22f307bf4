"""The runs of docs/predictions.md that ssl-run does not make: python scripts/predictions.py NAME.

groups    write NAME.npz for ink, slant and random: ten groups of the digits, as a label matrix Y (5000, 10)
collapse  experiment 3: VICReg with gamma = 2 alpha, from three starts
path      experiment 4: L-BFGS on the second moments of a linear model, with probes along the path

The script is in the source tree only. It prints one row per measurement.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from ssl_runner.build import Experiment, build
from ssl_runner.config.compose import CONF, prefer_our_presets, register_resolvers
from ssl_runner.data.readers import mnist5k
from ssl_runner.loss import VICReg
from ssl_runner.loss.base import off_diagonal
from ssl_runner.preemption import Preemption
from ssl_runner.probe import LinearProbe, evaluate
from ssl_runner.theory import linear_optimum
from ssl_runner.theory.diagnostics import Diagnostics
from ssl_runner.theory.moments import CentredMoments
from ssl_runner.theory.solver import split_linear_layer, stream_moments

USED = 0.1  # a direction of Z counts as used if its singular value exceeds this fraction of the largest
ALPHA = 25.0
MAX_EVALUATIONS = 20_000
WARMUP = 0.5  # share of the steps in which gamma rises


def main() -> None:
    """Parse the command line and run one of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("groups", "collapse", "path"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the files of `groups`")
    args = parser.parse_args()
    register_resolvers()
    prefer_our_presets()
    if args.what == "groups":
        write_groups(args.out)
        return
    for seed in args.seeds:
        for row in {"collapse": collapse, "path": path}[args.what](seed):
            print(" ".join(f"{name}={value}" for name, value in ({"seed": seed} | row).items()), flush=True)


def experiment(*overrides: str) -> Experiment:
    """Build an experiment from overrides of the default configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(compose("config", overrides=["device=cpu", *overrides]))


# Experiment 1


def write_groups(folder: Path) -> None:
    """Write the label matrices of three groupings, and print their label energies."""
    digits = mnist5k()
    images, y = digits.images[:, 0].double().numpy(), digits.labels.numpy()
    rows, columns = np.mgrid[:28, :28]
    mass = images / images.sum((1, 2), keepdims=True)
    dx = columns - (mass * columns).sum((1, 2))[:, None, None]
    dy = rows - (mass * rows).sum((1, 2))[:, None, None]
    properties = {
        "ink": images.sum((1, 2)),
        "slant": (mass * dx * dy).sum((1, 2)) / (mass * dy**2).sum((1, 2)),
        "random": np.random.default_rng(0).permutation(len(y)),
    }
    for name, values in properties.items():
        groups = np.argsort(np.argsort(values, kind="stable"), kind="stable") * 10 // len(y)
        Y = np.eye(10, dtype=np.uint8)[groups]
        np.savez_compressed(folder / f"{name}.npz", Y=Y)
        means = Y.T @ np.eye(10)[y] / Y.sum(0)[:, None]
        energy = np.square(means[groups] - means.mean(0)).sum() / np.square(np.eye(10)[y] - 0.1).sum()
        print(f"{folder / name}.npz label_energy={energy:.3f}")


# Experiment 3


def collapse(seed: int) -> Iterator[dict[str, Any]]:
    """Directions that can grow, and those that training uses, for gamma around and beyond alpha."""
    untrained = experiment(*rank_vs_gamma(seed, 24))
    mu = moment_eigenvalues(untrained)
    N = len(untrained.data.pretrain) * untrained.loader.V
    for gamma in (24, 30, 50):
        yield {"gamma": gamma, "can_grow": int((mu < ALPHA * N / ((N - 1) * gamma)).sum())}
    trained, row = train(experiment(*rank_vs_gamma(seed, 24)))
    yield {"gamma": 24, "start": "random"} | row
    yield {"gamma": 30, "start": "random"} | train(experiment(*rank_vs_gamma(seed, 30)))[1]
    yield {"gamma": 50, "start": "random"} | train(experiment(*rank_vs_gamma(seed, 50)))[1]
    from_24 = experiment(*rank_vs_gamma(seed, 50))
    from_24.model.load_state_dict(trained.model.state_dict())
    yield {"gamma": 50, "start": "gamma=24"} | train(from_24)[1]
    yield {"gamma": 50, "start": "warm-up"} | train(experiment(*rank_vs_gamma(seed, 50)), warmup=True)[1]


def rank_vs_gamma(seed: int, gamma: float) -> list[str]:
    """Overrides of one run of experiment=rank_vs_gamma."""
    return [
        "experiment=rank_vs_gamma",
        "loss=vicreg",
        "variance=squared",
        f"alpha={ALPHA}",
        "beta=25",
        f"gamma={gamma}",
        f"seed={seed}",
    ]


def moment_eigenvalues(untrained: Experiment) -> Tensor:
    """Eigenvalues mu of X'LX w = mu X'HX w, ascending, with X the input of the projector's last layer.

    Two passes in train mode first set the running statistics of batch norm.
    """
    model = untrained.model.train()
    with torch.no_grad():
        for number in range(2):
            for X, _ in untrained.loader.restarted().batches(number):
                model(X)
    *hidden, last = model.projector.children()
    frozen = nn.Sequential(model.backbone, *hidden).eval()
    moments = stream_moments(
        frozen, last.in_features, untrained.loader.restarted(), untrained.relation, 1
    ).centred()
    values, vectors = np.linalg.eigh(moments.XHX.numpy())
    kept = values > 1e-8 * values.max()
    T = vectors[:, kept] / np.sqrt(values[kept])
    return torch.from_numpy(scipy.linalg.eigvalsh(T.T @ (moments.XDX - moments.XGX).numpy() @ T))


class WithWarmup(VICReg):
    """VICReg, squared, whose gamma rises linearly from 0 over so many training steps."""

    def __init__(self, steps: float, alpha: float, beta: float, gamma: float):
        super().__init__(alpha, beta, gamma, variance="squared")
        self.steps, self.gamma, self.step = steps, gamma, 0

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():  # a training step
            self.step += 1
            self.weights["invariance"] = self.gamma * min(1.0, self.step / self.steps)
        return super().total(terms)


def train(parts: Experiment, warmup: bool = False) -> tuple[Experiment, dict[str, Any]]:
    """Train. With `warmup`, gamma rises over the first WARMUP of the steps.

    Returns the parts, and the directions that Z uses with its loss on the subset of the diagnostics.
    """
    if warmup:
        steps = parts.cfg.epochs * parts.loader.steps_per_epoch
        weights = (parts.loss.weights[term] for term in ("variance", "covariance", "invariance"))
        parts = replace(parts, loss=WithWarmup(WARMUP * steps, *weights))
    for _ in parts.solver(Preemption(), lambda state, how: None).epochs():
        pass
    diagnostics = Diagnostics(parts.loader, parts.relation, parts.loss, Path(), every=1, num_images=260)
    singular = np.array([row["Z"] for row in diagnostics.spectrum(parts.model)])
    columns: Any = diagnostics.evaluate(parts.model, parts.cfg.epochs)
    return parts, {
        "used": int((singular > USED * singular.max()).sum()),
        "loss": round(columns["subset_loss"], 1),
    }


# Experiment 4


def path(seed: int) -> Iterator[dict[str, Any]]:
    """Loss and accuracy along L-BFGS on the second moments of experiment=linear_regime, and with a ridge."""
    parts = experiment(
        "experiment=linear_regime",
        "loss=vicreg",
        "variance=squared",
        f"alpha={ALPHA}",
        "beta=25",
        "gamma=25",
        f"seed={seed}",
    )
    frozen, matrix = split_linear_layer(parts.model)
    moments = stream_moments(frozen, matrix.in_features, parts.loader, parts.relation, 20).centred()
    W = matrix.weight.detach().T.double().contiguous().requires_grad_()
    for ridge in (0.0, 0.01, 0.1, 1.0):
        best = linear_optimum(parts.loss, moments, parts.model.K, ridge)
        yield {"ridge": ridge, "loss": round(best.value, 2), "top1": accuracy(parts, best.W, moments)}
    floor = linear_optimum(parts.loss, moments, parts.model.K).value
    evaluations = 0
    while True:
        loss = float(vicreg(parts.loss.weights, W.detach(), moments))
        top1 = accuracy(parts, W.detach(), moments)
        yield {"evaluations": evaluations, "loss": round(loss, 2), "top1": top1}
        if loss < floor * (1 + 1e-4) or evaluations > MAX_EVALUATIONS:
            return
        evaluations += minimise(parts.loss.weights, W, moments, max(10, evaluations))


def minimise(weights: dict[str, float], W: Tensor, moments: CentredMoments, evaluations: int) -> int:
    """Continue L-BFGS on W (D, K), in place, for this number of evaluations. Returns their number."""
    solver = torch.optim.LBFGS(
        [W],
        max_iter=evaluations,
        max_eval=evaluations,
        history_size=50,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        solver.zero_grad()
        loss = vicreg(weights, W, moments)
        loss.backward()
        return loss

    solver.step(closure)
    return max(calls, 1)


def vicreg(weights: dict[str, float], W: Tensor, moments: CentredMoments) -> Tensor:
    """VICReg with squared variance of Z = X W, from the moments of X; differentiable in W (D, K)."""
    C = W.T @ moments.XHX @ W / (moments.N - 1)
    variance = (1 - C.diagonal()).square().sum()
    invariance = 2 / moments.N * (W * ((moments.XDX - moments.XGX) @ W)).sum()
    return (
        weights["variance"] * variance
        + weights["covariance"] * off_diagonal(C).square().sum()
        + weights["invariance"] * invariance
    )


def accuracy(parts: Experiment, W: Tensor, moments: CentredMoments) -> float:
    """Test accuracy of the linear probe on X W."""
    _, matrix = split_linear_layer(parts.model)
    with torch.no_grad():
        matrix.weight.copy_(W.T)
        matrix.bias.copy_(-moments.mean @ W)
    rows = evaluate("backbone", parts.model.backbone, parts.data, {"linear": LinearProbe}, score_test=True)
    return next(row["top1"] for row in rows if row["eval_split"] == "test")


if __name__ == "__main__":
    main()
