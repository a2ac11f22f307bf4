"""Views of several sizes in one step: which views there are, their order, and what is computed from them."""

from collections.abc import Callable
from copy import deepcopy
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from ssl_runner.backbone import convnet
from ssl_runner.compiler import compile_solver
from ssl_runner.data.preview import preview, with_heads
from ssl_runner.loss import SimCLR, VICReg
from ssl_runner.relation import Views
from ssl_runner.relation.builders import FromLabels, FromViews
from ssl_runner.theory.diagnostics import Diagnostics
from ssl_runner.theory.solver import stream_moments
from ssl_runner.train import Pretraining
from ssl_runner.views import Augment, ViewFormat, augment
from tests.device import OnDevice, pretended
from tests.helpers import TWO_SIZES, noise_loader, pretraining, rows, weights
from tests.test_compile import LIMIT
from tests.test_views import FULL

STATISTICS = torch.full((3,), 0.5), torch.full((3,), 0.25)
POLICIES = {"large": FULL | {"count": 2, "size": 12}, "small": FULL | {"count": 3}}


def on_cpu(policies: dict, V: int, images: Tensor, generator: torch.Generator, side: int) -> list[Tensor]:
    X = Augment(policies)(images, V, *STATISTICS, generator, view_format=ViewFormat(side))
    return X if isinstance(X, list) else [X]


def on_device(policies: dict, V: int, images: Tensor, generator: torch.Generator, side: int) -> list[Tensor]:
    with pretended():
        statistics = [OnDevice(tensor) for tensor in STATISTICS]
        X = Augment(policies)(OnDevice(images), V, *statistics, generator, view_format=ViewFormat(side))
    return [x.values for x in (X if isinstance(X, list) else [X])]


@pytest.mark.parametrize("make", [on_cpu, on_device])
def test_views_of_each_size_equal_those_of_the_policy_alone(make: Callable) -> None:
    """The policies take their random numbers one after the other."""
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    together, alone = (torch.Generator().manual_seed(1) for _ in range(2))
    X = make(POLICIES, 5, images, together, 8)
    assert [x.shape for x in X] == [(12, 3, 12, 12), (18, 3, 8, 8)]
    assert torch.equal(X[0], *make({"all": FULL}, 2, images, alone, 12))
    assert torch.equal(X[1], *make({"all": FULL}, 3, images, alone, 8))
    assert torch.equal(together.get_state(), alone.get_state())


def test_views_without_numba_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    by_numba = on_cpu(POLICIES, 5, images, torch.Generator().manual_seed(1), 8)
    monkeypatch.setattr(augment, "numba_works", lambda: False)
    assert_close(
        by_numba, on_cpu(POLICIES, 5, images, torch.Generator().manual_seed(1), 8), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("layout", "V", "expected"),
    [
        ("a2 b3", 5, {4: "aabbb"}),
        ("a2@8 b1 c2@8 d1@6", 6, {8: "aacc", 4: "b", 6: "d"}),
        ("a1@4 b2", 3, {4: "abb"}),
        ("a@8 b", 5, {8: "aaa", 4: "bb"}),
        ("a@8 b c@8", 7, {8: "acaca", 4: "bb"}),
        ("a b@8 c", 2, {4: "a", 8: "b"}),
    ],
)
@pytest.mark.parametrize("make", [on_cpu, on_device])
def test_order_of_views(make: Callable, layout: str, V: int, expected: dict[int, str]) -> None:
    """Views are in the order of the policies, and those of one size are together.

    Images are white, and the policy number p of "abcd" leaves a gray of its own.
    """
    policies = {}
    for entry in layout.split():
        head, _, size = entry.partition("@")
        gray = {"p": 1.0, "brightness": 0.0} if head[0] == "a" else None
        policies[head[0]] = {
            "jitter": gray,
            "affine": {"b": {"translate": 0.0}, "c": {"scale": [0.5, 0.5]}}.get(head[0]),
            "solarize": {"p": 1.0, "threshold": 0.0} if head[0] == "d" else None,
            "count": int(head[1:]) if head[1:] else None,
            "size": int(size) if size else None,
        }
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    single = {name: {**policy, "count": None, "size": None} for name, policy in policies.items()}
    X = make(policies, V, images, torch.Generator(), 4)
    naive = [
        torch.cat([make({"all": single[name]}, 1, images, torch.Generator(), side)[0] for name in names])
        for side, names in expected.items()
    ]
    assert_close(X, naive)


def test_v_that_is_not_the_sum_of_counts_raises_value_error() -> None:
    with pytest.raises(ValueError, match="V=4: expected 5, the sum of the counts"):
        on_cpu(POLICIES, 4, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.Generator(), 8)


# --- steps ---


def two_sizes(per_view: bool = False, **options: object) -> Pretraining:
    return pretraining(V=5, augment=Augment(TWO_SIZES), per_view=per_view, **options)


@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("relation", [FromViews(), FromLabels()])
def test_step_equals_separate_forward_passes(per_view: bool, relation: object) -> None:
    """Loss, gradients and running statistics of a step, from one forward pass per size, or per view."""
    training = two_sizes(per_view, loss=SimCLR(), relation=relation)
    large, small = (X := next(iter(training.loader.batches(0))))[0]
    batch, model = X[1], deepcopy(training.model)
    assert (large.shape, small.shape) == ((40, 3, 8, 8), (60, 3, 4, 4))
    values = training._gradients([large, small], batch)
    passes = [*large.split(20), *small.split(20)] if per_view else [large, small]
    Z = torch.cat([model(x) for x in passes])
    assert Z.shape[0] == 100
    loss = SimCLR()(Z, relation(batch, Z))
    loss.backward()
    assert_close(values["loss"], loss.detach())
    for a, b in zip(training.model.parameters(), model.parameters(), strict=True):
        assert_close(a.grad, b.grad)
    assert_close(dict(training.model.named_buffers()), dict(model.named_buffers()))


def test_loss_of_two_sizes_equals_naive_double_loop() -> None:
    """Views of one image are positives, whatever their sizes."""
    training = two_sizes(loss=VICReg(alpha=0, beta=0, gamma=1))
    X, batch = next(iter(training.loader.batches(0)))
    model = deepcopy(training.model)
    value = training._gradients(X, batch)["loss"]
    views = torch.cat([model(x).detach() for x in X]).unflatten(0, (5, 20))
    distances = [
        (views[v, i] - views[w, i]).square().sum() for i in range(20) for v in range(5) for w in range(5)
    ]
    G = Views(20, 5).dense()
    assert G.sum() == 20 * 5 * 4
    assert_close(value, sum(distances) / 100)


def test_resume_is_exact() -> None:
    expected, first, second = two_sizes(), two_sizes(), two_sizes()
    table = rows(expected)
    next(first.epochs())
    second.load_state_dict(deepcopy(first.state_dict()))
    assert rows(second) == table[1:]
    for name, value in weights(expected).items():
        assert torch.equal(value, weights(second)[name])


@torch._dynamo.config.patch({LIMIT: 8})  # torch's default, which timm.optim changes
def test_each_size_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo may compile a version of the network for every size of a step, and 8 for evaluators."""
    counter, compiled = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(compiled, backend=counter))
    training = two_sizes(epochs=2)
    assert compile_solver(True, training, training.loader) == "on"
    assert getattr(torch._dynamo.config, LIMIT) == 8 + 2
    losses = [[row["loss"] for row in rows(solver)] for solver in (training, two_sizes(epochs=2))]
    assert_close(*losses, rtol=1e-3, atol=0)
    assert counter.frame_count == 2


# --- evaluations ---


def test_diagnostics_embed_views_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_runner.theory.diagnostics.FORWARD_ROWS", 7)
    training = two_sizes()
    model, loader = training.model, training.loader
    diagnose = Diagnostics(loader, training.relation, VICReg(), Path(), every=1, num_images=12)
    chosen = torch.tensor([int((loader.data.train.indices == i).nonzero()) for i in diagnose.batch.indices])
    X, _ = loader.fixed_batch(loader.data.train, chosen)
    features, Z = diagnose.embed(model)
    model.eval()
    with torch.no_grad():
        assert_close(features, torch.cat([model.features(x) for x in X]))
        assert_close(Z, torch.cat([model(x) for x in X]))


def test_moments_of_several_sizes_are_those_of_all_views() -> None:
    loader = noise_loader(Augment(TWO_SIZES), V=5, batch_size=60)
    frozen = convnet(3, 4, [4])
    moments = stream_moments(frozen, 4, loader, FromViews(), passes=1)
    X, _ = next(iter(loader.restarted().batches(0)))
    frozen.eval()
    with torch.no_grad():
        features = torch.cat([frozen(x) for x in X]).double()
    assert_close(moments.centred().mean, features.mean(0), rtol=1e-5, atol=1e-6)


def test_preview_pads_small_views_and_heads_columns(tmp_path: Path) -> None:
    loader = noise_loader(Augment({"large": {"count": 1, "size": 12}, "small": {"count": 1, "size": 4}}))
    preview(loader, tmp_path / "views.png", "views=mine", images=2)
    picture = torch.from_numpy(np.asarray(Image.open(tmp_path / "views.png")).copy()).movedim(2, 0)
    step, scale = 12 * 8 + 2, 8  # 96 pixels for 12
    assert (picture.shape[0], picture.shape[2]) == (3, 3 * step + 2)
    heads, picture = (
        picture[0].split([picture.shape[1] - 2 * step - 2, 2 * step + 2])[0],
        picture[:, -2 * step - 2 :],
    )
    title, numbers, names = (heads[top : top + 17] < 128 for top in (4, 25, 42))
    assert title[:, : 2 * step].any()
    assert not title[:, 2 * step :].any()
    columns = torch.arange(3 * step + 2) // step
    assert [bool(numbers[:, columns == column].any()) for column in range(3)] == [True, True, True]
    assert [bool(names[:, columns == column].any()) for column in range(3)] == [False, True, True]
    small = picture[:, 2:step, 2 * step + 2 : 3 * step]
    border = 4 * scale
    assert (small[:, :border] == 255).all()
    assert (small[:, border:-border, border:-border] < 255).any()


@pytest.mark.parametrize("counted", [False, True])
def test_names_of_policies_are_in_the_order_of_views(counted: bool) -> None:
    """Each policy is recognised by its views: b makes small ones, and c flips the white half to the right."""
    policies = {"a": {"size": 6}, "b": {"size": 4}, "c": {"size": 6, "flip": 1.0}}
    if counted:
        policies = {name: policy | {"count": 2 - (name == "b")} for name, policy in policies.items()}
    augment = Augment(policies)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[..., :4] = 255
    X = augment(images, 5, torch.zeros(1), torch.ones(1), torch.Generator().manual_seed(0))
    views = [view for x in X for view in x[::2]]
    expected = ["b" if view.shape[1] == 4 else "c" if view[0, 0, -1] > 0.5 else "a" for view in views]
    assert augment.policies_of_views(5) == expected
    assert set(expected) == {"a", "b", "c"}
    assert Augment({"all": {}}).policies_of_views(5) == [""] * 5


def test_long_heads_are_shortened_to_their_column() -> None:
    picture = with_heads(np.full((10, 200, 3), 255, dtype=np.uint8), "views=mine", ["original", "v" * 99])
    assert (picture.width, picture.height) == (200, 10 + 2 * 17 + 12)
    assert np.asarray(picture)[:, :100].min() < 128
    assert np.asarray(picture)[21:, 99:102].min() == 255
