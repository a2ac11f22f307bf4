"""Results do not depend on torch's default device and dtype: tensors are made where their input is."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_runner.batch import Batch
from ssl_runner.data.eval_transform import EvalTransform
from ssl_runner.loss import MMCR, WMSE, BarlowTwins, FroSSL, Loss, SIGReg, SimCLR, SpectralContrastive, VICReg
from ssl_runner.numerics import usual_defaults
from ssl_runner.pretrained import Transform
from ssl_runner.probe.baselines import linear_discriminants, principal_components
from ssl_runner.probe.knn import KnnProbe
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.ridge import RidgeProbe
from ssl_runner.relation import (
    DegreeNormalized,
    Edges,
    KNearest,
    Labels,
    Relation,
    ViewExpanded,
    Views,
    WithSupportSet,
    builders,
    rewire,
)
from ssl_runner.relation.shared_labels import SharedLabels
from ssl_runner.relation.walks import FromWalks
from ssl_runner.theory import linear_optimum, optimum, thresholds
from ssl_runner.theory.diagnostics import of_embedding
from ssl_runner.theory.gamma import expected_relation
from ssl_runner.theory.measures import label_energy_of_optimum
from ssl_runner.theory.moments import Moments
from ssl_runner.views import Augment
from tests.helpers import is_defined, load, toy
from tests.test_views import FULL

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3, 0, 2, 2, 2])
BATCH = Batch(torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2]), 2, 3)
NEAREST = torch.tensor([[1], [2], [0], [4], [3], [3]])
SUPPORT, Z = torch.randn(6, 3), torch.randn(18, 3)
GENERATOR, IMAGES = torch.Generator(), toy()
RELATIONS: dict[str, Callable[[], Relation]] = {
    "views": lambda: Views(6, 2, device="cpu"),
    "views normalized": lambda: Views(4, 3, normalized=True, device="cpu"),
    "labels": lambda: Labels(LABELS),
    "labels normalized": lambda: Labels(LABELS, 4, normalized=True),
    "edges": lambda: Edges(NEAREST[:, 0], torch.arange(6, 12, device="cpu"), 12),
    "edges of lists": lambda: Edges([0, 1, 5], [1, 2, 7], 12),
    "nearest": lambda: ViewExpanded(KNearest(NEAREST), 2),
    "nearest normalized": lambda: DegreeNormalized(ViewExpanded(KNearest(NEAREST), 2)),
    "rewired": lambda: rewire(Labels(LABELS), 0.5, GENERATOR.manual_seed(0)),
    "shared labels": lambda: SharedLabels((LABELS[:, None] >= LABELS[:5]).float(), normalized=True),
    "expected views": lambda: expected_relation(builders.FromViews(), 2, 6, LABELS),
    "expected labels": lambda: expected_relation(builders.FromLabels(), 2, 6, LABELS),
    "support": lambda: WithSupportSet(3, 2, SUPPORT),
    "from views": lambda: builders.FromViews()(BATCH, Z[:12]),
    "from labels": lambda: builders.FromLabels()(BATCH, Z[:12]),
    "from neighbors": lambda: builders.FromNeighbors(2)(BATCH, Z[:12]),
    "from walks": lambda: FromWalks(2)(BATCH, Z[:12]),
    "from a queue": lambda: second_call(builders.FromNeighbors(1, queue=8)),
    "from noisy labels": lambda: second_call(builders.Rewired(builders.FromLabels())),
}
FROM_BUILDERS = [name for name in RELATIONS if name.startswith("from")]
PROBES = {"linear probe": LinearProbe, "ridge probe": RidgeProbe, "kNN probe": KnnProbe}
LOSSES: list[Callable[[], Loss]] = [
    lambda: VICReg(variance="squared", beta=25.0),
    SimCLR,
    lambda: SpectralContrastive(center=True),
    lambda: BarlowTwins(center=True),
    MMCR,
    FroSSL,
    lambda: seeded(SIGReg(directions=8)),
    lambda: WMSE(unit_rows=False),
    lambda: seeded(WMSE(whitening_size=5)),
]


def seeded(loss: Loss) -> Loss:
    loss.counter.state.fill_(3)
    return loss


def second_call(builder: builders.RelationBuilder) -> Relation:
    builder.bind(BATCH.labels)
    builder(BATCH, Z[:12])
    return builder(BATCH, Z[:12])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {  # nothing can be computed on meta: a tensor that is made there raises sooner or later
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
}


def of_relation(name: str) -> list[Tensor]:
    """The relation, its losses and gradients and, unless a builder made it, closed forms and diagnostics."""
    G = RELATIONS[name]()
    values = [G.dense(torch.float32), G.degrees, G.edges(), G.weights(), G.square_norm]
    for make in LOSSES:
        loss = make()
        if not is_defined(loss, G):
            continue
        rows = Z[: G.num_rows].clone().requires_grad_()
        value = loss(rows, G)
        value.backward()
        values += [value.detach(), rows.grad]
        if name in ("support", *FROM_BUILDERS):
            continue
        best, Y = optimum(loss, G, 3), F.one_hot(LABELS % 3).double()
        numbers = [
            best.value,
            *label_energy_of_optimum(Y, best),
            *of_embedding(rows.detach(), 2, Y, best).values(),
        ]
        moments = Moments(3, CPU)
        moments.add(rows.detach(), G)
        with suppress(NotImplementedError):
            values.append(linear_optimum(loss, moments.centred(), 2, ridge=0.1).W)
        with suppress(NotImplementedError):
            values.append(thresholds(loss, G, 3))
        numbers = [x for x in numbers if x is not None]
        values.append(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
    return values


def of_probe(name: str) -> list[Tensor]:
    values = []
    for n, d in ((60, 8), (20, 40)):
        X = torch.linspace(0, 9, n * d, device="cpu", dtype=torch.float32).cos().view(n, d)
        fitted = PROBES[name](X, torch.arange(n, device="cpu") % 3, 3)
        (setting, scores), *_ = fitted.path(X)
        values += [scores, fitted.scores(setting, X)]
    return values


@cache
def at_usual_defaults(name: str) -> list[Tensor]:
    return of_probe(name) if name in PROBES else of_relation(name)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", [*RELATIONS, *PROBES])
def test_results_do_not_depend_on_default_device_and_dtype(name: str, default: str) -> None:
    expected = at_usual_defaults(name)
    with DEFAULTS[default]():
        values = of_probe(name) if name in PROBES else of_relation(name)
    for value, right in zip(values, expected, strict=True):
        assert value.device == CPU
        assert value.dtype == right.dtype
        assert torch.equal(value, right)


def of_images() -> list[Tensor]:
    """Views with both kernels of a CPU, statistics of a data set, a transformed image and a random state."""
    pixels = torch.arange(4 * 3 * 9 * 9, device="cpu").view(4, 3, 9, 9).mul(7).to(torch.uint8)
    mean, std = (torch.full((3,), value, device="cpu", dtype=torch.float32) for value in (0.4, 0.2))
    augment, generator = Augment({"all": FULL}), torch.Generator()
    values = [augment(pixels, 2, mean, std, generator.manual_seed(5))]
    with mock.patch("ssl_runner.views.augment.numba_works", return_value=False):
        values.append(augment(pixels, 2, mean, std, generator.manual_seed(5)))
    data = load(IMAGES)
    transform = Transform(8, 3, mean, std, evaluation=EvalTransform(10, 8))
    return [*values, data.mean, data.std, data.train.y, transform(pixels[0].permute(1, 2, 0).numpy())]


@pytest.mark.parametrize("default", DEFAULTS)
def test_images_do_not_depend_on_default_device_and_dtype(default: str) -> None:
    expected = of_images()
    with DEFAULTS[default]():
        values = of_images()
    for value, right in zip(values, expected, strict=True):
        assert (value.device, value.dtype) == (CPU, right.dtype)
        assert torch.equal(value, right)


def test_usual_defaults_are_restored() -> None:
    with default_dtype(torch.float64), torch.device("meta"):
        with suppress(KeyError), usual_defaults():
            assert (torch.empty(0).dtype, torch.empty(0).device) == (torch.float32, CPU)
            raise KeyError
        assert (torch.empty(0).dtype, torch.empty(0).device.type) == (torch.float64, "meta")


@pytest.mark.parametrize("default", DEFAULTS)
def test_pixel_baselines_do_not_depend_on_default_device_and_dtype(default: str) -> None:
    data = load(toy(30))
    with DEFAULTS[default]():
        principal_components(data, 3)
        linear_discriminants(data)


def test_usual_defaults_of_overlapping_threads_restore_those_of_the_caller() -> None:
    torch.set_default_dtype(torch.float64)
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with usual_defaults():
            entered.set()
            left.wait(10)
            assert torch.get_default_dtype() == torch.float32

    try:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(first)
            entered.wait(10)
            with usual_defaults():
                assert torch.get_default_dtype() == torch.float32
            left.set()
            done.result()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
