"""The experiments of conf/: their grids, the commands of their headers, and the published recipes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner.build import build_optimizer
from ssl_runner.config import arguments, check, compose
from ssl_runner.config.compose import CONF
from ssl_runner.data import readers
from ssl_runner.relation import Views
from tests.helpers import TINY, run_folder, table, toy

RECIPES = [
    f"{data}_{loss}" for data in ("cifar10", "cifar100", "stl10") for loss in ("simclr", "vicreg", "barlow")
]


def header_commands() -> list[str]:
    """The commands in the headers of the experiments, with the loops of bash unrolled."""
    found = []
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        header = file.read_text().partition("\ndefaults:")[0].replace(" \\\n#", "")
        losses = re.findall(r'^#   for loss in "(.*)"; do', header, flags=re.M)
        for call in re.findall(r"^# *(?:\w+=\S+ )*ssl-run (.*)", header, flags=re.M):
            command = call.replace("${loss%% *}", "x")
            values = losses[0].split('" "') if "$loss" in command else [""]
            found += [command.replace("$loss", value).partition("  #")[0] for value in values]
    return found


@pytest.mark.slow  # composes 90 jobs
@pytest.mark.parametrize("command", header_commands())
def test_header_commands_of_experiments_are_accepted(ssl_run, command: str) -> None:
    code, out, err = ssl_run(f"{command} seed=0 --cfg job")  # one seed: a third of the jobs
    assert (code, err) == (0, "")
    assert out


def test_grid_of_experiment_runs_all_jobs_without_m(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "grid.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1', gamma: '1,5'}}}\n"
    )
    code, out, _ = ssl_run(f"--config-dir mine experiment=grid gamma=7 hydra.sweep.dir=all {TINY}")
    assert code == 0
    assert out.startswith(f"sweep: 2 jobs\nsweep={tmp_path}/all\njob #0 (seed=0)\n")
    assert out.endswith("all jobs are done\n")
    configs = [OmegaConf.load(tmp_path / "all" / str(job) / ".hydra" / "config.yaml") for job in (0, 1)]
    assert [(config["seed"], config["gamma"]) for config in configs] == [(0, 7), (1, 7)]


def test_axes_of_one_value_are_options_of_a_single_run(ssl_run, tmp_path: Path) -> None:
    code, out, _ = ssl_run("experiment=low_label gamma=5 seed=2 --cfg job")
    assert code == 0
    config = OmegaConf.create(out)
    assert (config.variance, config.beta, config.gamma, config.seed) == ("squared", 25, 5, 2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "-m experiment=supcon,low_label",
            "experiment=low_label: has a grid of its own, which has no effect on a sweep over files",
        ),
        ("experiment=low_label loss=simclr", "variance is an option of loss=vicreg, not of loss=simclr"),
    ],
)
def test_sweep_of_experiment_that_cannot_apply_is_refused(ssl_run, command: str, message: str) -> None:
    code, out, err = ssl_run(f"{command} --cfg job")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(message)


# --- published recipes --------------------------------------------------------------------------------------


def experiment(name: str, *overrides: str) -> DictConfig:
    """The checked configuration of one run of an experiment."""
    compose.register_resolvers()
    compose.prefer_our_presets()
    [(_, config)] = check.check(arguments.parse(arguments.parser(), [f"experiment={name}", *overrides]))
    return config


def solo_vicreg(a: Tensor, b: Tensor) -> Tensor:
    """solo-learn: 25 mse + 25 (sum over views of the mean hinge) + sum over views of covariances^2 / K."""
    loss = 25 * (a - b).square().mean()
    for z in (a, b):
        C = z.T.cov()
        loss = loss + 25 * (1 - (C.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        loss = loss + (C.square().sum() - C.diagonal().square().sum()) / len(C)
    return loss


def solo_barlow(a: Tensor, b: Tensor) -> Tensor:
    """solo-learn: 0.1 (sum_k (c_kk - 1)^2 + 0.0051 sum_{k != l} c_kl^2) of batch-normalised embeddings."""
    normalised = [(z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b)]
    c = normalised[0].T @ normalised[1] / len(a)
    diagonal = c.diagonal()
    return 0.1 * ((diagonal - 1).square().sum() + 0.0051 * (c.square().sum() - diagonal.square().sum()))


def cross_entropy_simclr(tau: float, a: Tensor, b: Tensor) -> Tensor:
    """solo-learn and Ermolov et al.: mean cross-entropy of the positive among all other rows."""
    Z = F.normalize(torch.cat([a, b]))
    logits = (Z @ Z.T / tau).fill_diagonal_(-torch.inf)
    n = len(a)
    return F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))


@pytest.mark.parametrize(
    ("name", "published", "factor"),
    [
        ("cifar10_simclr", lambda *views: cross_entropy_simclr(0.2, *views), 1.0),
        ("stl10_simclr", lambda *views: cross_entropy_simclr(0.5, *views), 1.0),
        ("cifar100_vicreg", solo_vicreg, 1.0),
        ("stl10_vicreg", solo_vicreg, 1.0),
        ("cifar10_barlow", solo_barlow, 10.0),
        ("stl10_barlow", solo_barlow, 10.0),
    ],
)
def test_loss_of_recipe_is_multiple_of_published_loss(name: str, published, factor: float) -> None:
    """Value and gradient agree for two views with equal statistics; ours uses statistics over both views.

    The weights of VICReg contain 1 / K and are converted to the K of this test.
    """
    config, n, K = experiment(name), 1000, 6
    if name.endswith("vicreg"):
        for weight in ("alpha", "beta", "gamma"):
            config[weight] *= config.projector.K / K
    base = torch.randn(n, K, dtype=torch.float64) @ torch.randn(K, K, dtype=torch.float64) / 4
    views = [view.clone().requires_grad_() for view in (base, 0.6 * base + 0.8 * base.flip(0))]
    views[1].data *= base.std(0) / views[1].data.std(0)
    ours = instantiate(config.loss)(torch.cat(views), Views(n, 2))
    theirs = published(*views)
    assert ours.item() == pytest.approx(factor * theirs.item(), rel=0.01)
    mine, reference = (torch.cat(torch.autograd.grad(loss, views)) for loss in (ours, theirs))
    assert float(F.cosine_similarity(mine.flatten(), reference.flatten(), dim=0)) > 0.99
    assert float(mine.norm()) == pytest.approx(factor * float(reference.norm()), rel=0.02)


def after_steps(config: DictConfig, gradients: list[list[Tensor]], factor: float) -> list[Tensor]:
    """The weight and the bias of a layer after steps with these gradients times `factor`, lr falling."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 5, dtype=torch.float64)
    lars = build_optimizer(config, layer)
    for step, values in enumerate(gradients, start=1):
        for group in lars.param_groups:
            group["lr"] = config.optimizer.lr / step
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.grad = factor * value
        lars.step()
    return list(layer.parameters())


@pytest.mark.parametrize("name", ["cifar100_barlow", "stl10_barlow"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of the gradients: rates of LARS below lr, and clipped to lr
def test_barlow_takes_the_steps_of_a_tenth_of_the_loss(name: str, scale: float) -> None:
    """solo-learn: the loss times 0.1 with lr 0.3 and weight decay 0.0001."""
    ours = experiment(name)
    source = OmegaConf.merge(ours, {"optimizer": {"lr": 0.3, "weight_decay": 0.0001}})
    assert isinstance(source, DictConfig)
    shapes, draws = ((5, 9), (5,)), torch.Generator().manual_seed(0)
    gradients = [
        [scale * torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]
        for _ in range(4)
    ]
    expected = after_steps(source, gradients, 0.1)
    assert_close(after_steps(ours, gradients, 1.0), expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(AssertionError):  # the options of the source do not compensate for the factor
        assert_close(after_steps(source, gradients, 1.0), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("cifar100")])
def test_recipe_trains_two_steps(ssl_run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    side = 72 if name == "stl10_simclr" else 32
    monkeypatch.setattr(readers, name.partition("_")[0], lambda **given: toy(per_class=6, side=side))
    code, out, err = ssl_run(
        f"experiment={name} epochs=1 batch_size=8 device=cpu optimizer.warmup_epochs=0 projector.width=16"
        " projector.K=8 probe.probes=[knn] probe.features=[backbone] diagnostics.every=0"
        " embedding.method=none"
    )
    assert (code, err) == (0, "")
    assert torch.isfinite(torch.tensor(float(table(run_folder(out) / "metrics.csv")[-1]["loss"])))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_source_and_figures(name: str) -> None:
    header = (CONF / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    for line in (f"ssl-run experiment={name}", "published: ", "measured: "):
        assert f"#   {line}" in header
    page = (CONF.parent / "docs" / "recipes.md").read_text()
    assert f"| `{name}` |" in page


@pytest.mark.parametrize("V", [2, 4, 16])
def test_experiments_of_views_hold_equal_what_they_say(V: int) -> None:
    """Images in a batch, rows in a batch, epochs, and rows in all, relative to V = 2."""
    given = {
        name: experiment(name, f"V={V}", "seed=0") for name in ("views_rows", "views_images", "views_time")
    }
    counts = {name: (c.batch_size, V * c.batch_size, c.epochs) for name, c in given.items()}
    assert counts == {
        "views_rows": (256 // V, 256, 8),
        "views_images": (128, 128 * V, 8),
        "views_time": (256 // V, 256, 16 // V),
    }
