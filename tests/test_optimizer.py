"""Parameter groups, LARS compared with its formula, fused implementations, learning-rate schedule."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import timm.optim
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.testing import assert_close

from ssl_runner import optimizer
from ssl_runner.build import OPTIMIZER_SETTINGS, build_node
from ssl_runner.config.compose import CONF


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_weight_decay_skips_1d_parameters() -> None:
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer.build([net], torch.optim.AdamW, lr=0.1, weight_decay=0.5).step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert_close(parameter.detach(), old if parameter.ndim == 1 else old * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_step_matches_formula(weight_decay: float) -> None:
    """You et al. 2017: the step is lr * trust * |w| / (|g| + wd |w|) * (g + wd w), and lr * g for vectors."""
    net, lr, trust = model(), 0.3, 0.01
    net(torch.randn(8, 3)).square().sum().backward()
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in net.parameters()]
    algorithm = partial(timm.optim.Lars, momentum=0.9, trust_coeff=trust)
    optimizer.build([net], algorithm, lr=lr, weight_decay=weight_decay).step()
    for parameter, (w, g) in zip(net.parameters(), before, strict=True):
        adapted = lr * trust * w.norm() / (g.norm() + weight_decay * w.norm()) * (g + weight_decay * w)
        step = lr * g if w.ndim == 1 else adapted
        assert_close(parameter.detach(), w - step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trust", [0.001, 1000.0])  # the trust ratio is below lr, and above it
def test_lars_trust_clip_limits_the_adapted_rate_to_lr(trust: float) -> None:
    """LARC: the rate of a layer is min(trust |w| / (|g| + wd |w|), lr) with trust_clip=true."""
    options = ["optimizer=lars", f"optimizer.trust_coeff={trust}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", options).optimizer.trust_clip is False
        cfg = compose("config", [*options, "optimizer.trust_clip=true"])
    algorithm = build_node("optimizer", cfg.optimizer, without=OPTIMIZER_SETTINGS, partial=True)
    net, lr, wd = model(), 0.3, 0.1
    net(torch.randn(8, 3)).square().sum().backward()
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in net.parameters()]
    optimizer.build([net], algorithm, lr=lr, weight_decay=wd).step()
    for parameter, (w, g) in zip(net.parameters(), before, strict=True):
        ratio = trust * w.norm() / (g.norm() + wd * w.norm())
        step = lr * g if w.ndim == 1 else min(ratio, torch.tensor(lr)) * (g + wd * w)
        assert_close(parameter.detach(), w - step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)]
)
def test_fused_implementation_is_default_and_matches_plain_one(kind: Callable) -> None:
    fused, plain = model(), model()
    algorithms = [
        optimizer.build([fused], kind, 0.1, 0.5),
        optimizer.build([plain], partial(kind, foreach=False), 0.1, 0.5),
    ]
    assert [algorithm.defaults["fused"] for algorithm in algorithms] == [True, None]
    for _ in range(3):
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for algorithm in algorithms:
            algorithm.step()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_schedule_is_linear_warmup_then_cosine() -> None:
    rates = [optimizer.cosine(step, steps=100, warmup=10, lr=2.0, final_ratio=0.1) for step in range(100)]
    assert_close(rates[:10], [0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert optimizer.cosine(0, steps=5, warmup=0, lr=1.0, final_ratio=0.0) == 1.0
    assert optimizer.cosine(2, steps=3, warmup=3, lr=1.0, final_ratio=0.0) == 1.0
