"""Training steps cause no host-device sync.

Most tests run whole steps on the emulated device of tests/device.py, which needs no GPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import optimizer, relation
from ssl_runner.backbone import Backbone, convnet, resnet, vit_tiny
from ssl_runner.batch import Batch
from ssl_runner.config.compose import CONF
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.device import syncs_raise, to_device
from ssl_runner.loss import MMCR, WMSE, BarlowTwins, FroSSL, Loss, SIGReg, SimCLR, SpectralContrastive, VICReg
from ssl_runner.model import SSLModel
from ssl_runner.projector import mlp
from ssl_runner.relation import Relation
from ssl_runner.relation.builders import (
    FromEdges,
    FromLabels,
    FromNeighbors,
    FromViews,
    RelationBuilder,
    Rewired,
)
from ssl_runner.relation.walks import FromWalks
from ssl_runner.train import NonFiniteGuard, Pretraining
from ssl_runner.views import Augment
from tests.device import OnDevice, Waits, moved, pretended
from tests.helpers import CPU, load, toy

LOSSES = {
    "vicreg": VICReg,
    "squared": partial(VICReg, variance="squared"),
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "centred": partial(BarlowTwins, center=True),
    "surrogate": SpectralContrastive,
    "frossl": FroSSL,
    "sigreg": SIGReg,
    "wmse": WMSE,
    "wmse blocks": partial(WMSE, whitening_size=6),
}
OPTIMIZERS: dict[str, Callable] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "lars": partial(timm.optim.Lars, momentum=0.9, trust_coeff=0.001),
}
RELATIONS: dict[str, Callable[[str], RelationBuilder]] = {
    "views": lambda path: FromViews(),
    "normalized views": lambda path: FromViews(normalized=True),
    "labels": lambda path: FromLabels(),
    "normalized labels": lambda path: FromLabels(normalized=True),
    "neighbors": lambda path: FromNeighbors(2),
    "queue": lambda path: FromNeighbors(2, queue=30, normalized=True),
    "noisy": lambda path: Rewired(FromLabels(), normalized=True),
    "edges": lambda path: FromEdges(path),
    "walks": lambda path: FromWalks(3, normalized=True),
    "shared labels": lambda path: FromLabels(True, path.replace("pairs", "labels"), weighted=True),
    "several labels": lambda path: FromLabels(path=path.replace("pairs", "labels")),
    "noisy edges": lambda path: Rewired(FromEdges(path)),
}
# an option that does not concern the relation runs with two of them, all other losses with all
OPTIONS = ("squared", "centred")
PAIRS = [
    (loss, of) for loss in LOSSES for of in RELATIONS if loss not in OPTIONS or of in ("views", "labels")
]
SMALL = partial(convnet, widths=[4, 8])
POLICIES = ("simclr", "vicreg", "barlow", "digits")


def policy(name: str) -> Augment:
    return instantiate(OmegaConf.load(CONF / "views" / f"{name}.yaml"))


def steps(
    loss: Loss,
    of: RelationBuilder,
    augment: Augment,
    algorithm: Callable = torch.optim.AdamW,
    backbone: Callable[..., Backbone] = SMALL,
    device: torch.device | None = None,
    precision: str = "fp32",
    compiler: str | None = None,
    rounds: int = 3,
) -> list[dict[str, Tensor]]:
    """Run whole training steps, from batch loading to optimiser, and return the logged values of each.

    The default device is the emulated one. A queue is empty in the first step, so that at least two steps are
    needed to include its neighbours. On CUDA the first step may sync, because of one-time initialisation.
    """
    torch.manual_seed(0)
    source = toy(side=16)
    source.images = torch.randint(0, 256, source.images.shape, dtype=torch.uint8)
    data = load(source, device=device or CPU)
    of.bind(source.labels)
    body = backbone(3, 16)
    model = SSLModel(body, mlp(body.width, 8, 2, 5), channels_last=True)
    if device is None:
        data.pretrain = replace(
            data.pretrain, images=OnDevice(data.pretrain.images), labels=OnDevice(data.pretrain.labels)
        )
        data.mean, data.std = OnDevice(data.mean), OnDevice(data.std)
    for module in (model, loss):
        moved(module) if device is None else module.to(device)
    with pretended() if device is None else nullcontext():
        training = Pretraining(
            model,
            loss,
            MultiViewLoader(data, augment, V=2, batch_size=20, seed=0),
            of,
            optimizer=optimizer.build([model, loss], algorithm, 1e-2, 1e-2),
            learning_rate=lambda step: 1e-2,
            precision=precision,
            clip_grad_norm=1.0,
        )
        if compiler is not None:
            training.network.compile(backend=compiler, dynamic=False)
        guard = NonFiniteGuard()
        values = []
        batches, on_cuda = training.loader.batches(0), device is not None and device.type == "cuda"
        for number in range(rounds):
            with syncs_raise() if on_cuda and number else nullcontext():
                values.append(training._step(*next(batches), guard))
    if device is None:
        assert len(guard.pending) == rounds, "a value was read before it arrived"
    return values


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.csv").write_text("i,j\n" + "\n".join(f"{i},{i + 4}" for i in range(80)))
    (tmp_path / "labels.csv").write_text("a,b\n" + "".join(f"{i % 2},{int(i % 3 < 2)}\n" for i in range(88)))
    return str(tmp_path / "pairs.csv")


@pytest.mark.parametrize(("loss", "of"), PAIRS)
def test_losses_and_relations_do_not_sync(loss: str, of: str, pairs: str) -> None:
    # every policy runs with every relation; the second step has the neighbours in a queue
    views = POLICIES[([*LOSSES].index(loss) + [*RELATIONS].index(of)) % len(POLICIES)]
    steps(LOSSES[loss](), RELATIONS[of](pairs), policy(views), rounds=2 if of == "queue" else 1)


@pytest.mark.parametrize("loss", [partial(SimCLR, denominator="negatives"), partial(FroSSL, per_view=True)])
def test_losses_of_some_relations_do_not_sync(loss: Callable[[], Loss]) -> None:
    steps(loss(), FromViews(), Augment({"all": {}}))
    if loss().needs_groups:
        steps(loss(), FromLabels(normalized=True), Augment({"all": {}}))


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
@pytest.mark.parametrize("views", POLICIES)
def test_views_and_optimizers_do_not_sync(algorithm: str, views: str) -> None:
    steps(VICReg(), FromViews(), policy(views), OPTIMIZERS[algorithm])


@pytest.mark.parametrize(
    "algorithm", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_fp16_grad_scaler_syncs_only_without_fused_optimizer(algorithm: Callable) -> None:
    """A fused optimiser checks for overflow on the device. Otherwise the scaler reads the result."""
    steps(VICReg(), FromViews(), Augment({"all": {}}), algorithm, precision="fp16")
    with pytest.raises(Waits, match="item"):
        steps(
            VICReg(), FromViews(), Augment({"all": {}}), partial(algorithm, foreach=False), precision="fp16"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", [vit_tiny, partial(resnet, name="resnet18")], ids=["vit_tiny", "resnet18"]
)
def test_backbones_do_not_sync(backbone: Callable) -> None:
    steps(SimCLR(), FromViews(), policy("digits"), backbone=backbone, rounds=1)


def test_emulated_device_computes_same_values_as_cpu() -> None:
    """The policy is empty because random numbers differ between the emulated device and the CPU."""
    emulated, expected = (
        steps(VICReg(), FromLabels(), Augment({"all": {}}), device=device) for device in (None, CPU)
    )
    for a, b in zip(emulated, expected, strict=True):
        for name, value in b.items():
            assert_close(a[name].values, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("of", RELATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_on_cuda_do_not_sync(loss: str, of: str, precision: str, pairs: str) -> None:
    """The second and third step do not sync. Views and optimisers vary with loss and relation.

    fp16 requires a fused optimiser.
    """
    turn = [*LOSSES].index(loss) + [*RELATIONS].index(of)
    views, algorithm = POLICIES[turn % len(POLICIES)], [*OPTIMIZERS.values()][turn % len(OPTIMIZERS)]
    if precision == "fp16":
        algorithm = torch.optim.AdamW
    steps(
        LOSSES[loss](),
        RELATIONS[of](pairs),
        policy(views),
        algorithm,
        device=torch.device("cuda", 0),
        precision=precision,
    )


# --- the tests above detect syncs ---------------------------------------------------------------------------


def spoilt(spoil: Callable[[Tensor], object]) -> Loss:
    """Return VICReg with an additional call spoil(Z)."""

    class Spoilt(VICReg):
        def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
            spoil(Z)
            return super()._terms(Z, G)

    return Spoilt()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda Z: Z.sum().item(),
        lambda Z: Z[0].tolist(),
        lambda Z: float(Z.sum()),
        lambda Z: bool(Z.isnan().any()),
        lambda Z: 0 if Z.isnan().any() else 1,
        lambda Z: range(Z.argmax()),
        lambda Z: Z[: Z.argmax()],
        lambda Z: f"{Z.sum():.3g}",
        lambda Z: Z.detach().cpu(),
        lambda Z: Z.detach().to("cpu"),
        lambda Z: Z.detach().to("cpu", non_blocking=True),
        lambda Z: Z.detach().numpy(),
        lambda Z: torch.empty(Z.shape).copy_(Z.detach()),
        lambda Z: Z.nonzero(),
        lambda Z: torch.argwhere(Z > 0),
        lambda Z: torch.where(Z > 0),
        lambda Z: Z[Z > 0],
        lambda Z: Z.masked_select(Z > 0),
        lambda Z: Z.clone().index_put_((Z > 0,), Z.new_zeros(())),
        lambda Z: torch.equal(Z, Z),
        lambda Z: torch.allclose(Z, Z),
        lambda Z: Z.detach().unique(),
        lambda Z: torch.bincount(Z.argmax(1)),
        lambda Z: torch.repeat_interleave(Z, Z.argmax(1), 0),
        lambda Z: torch.linalg.eigh(Z.T @ Z),
        lambda Z: torch.ones(3).to(Z.device),
        lambda Z: torch.ones(3).to(Z.device, non_blocking=True),
        lambda Z: torch.ones(3).pin_memory().to(Z.device),
        lambda Z: Z + torch.ones(len(Z), 1),
        lambda Z: Z[torch.arange(3)],
        lambda Z: torch.where(Z > 0, Z, torch.tensor(0.0)),
        lambda Z: torch.cuda.synchronize(),
        lambda Z: torch.cuda.Event().synchronize(),
    ],
)
def test_sync_in_loss_is_detected(spoil: Callable[[Tensor], object]) -> None:
    with pytest.raises(Waits):
        steps(spoilt(spoil), FromViews(), Augment({"all": {}}), rounds=1)


@pytest.mark.parametrize(
    "make", [lambda Z: torch.tensor([1.0], device=Z.device), lambda Z: Z + Z.new_tensor([1.0])]
)
def test_tensor_from_python_numbers_on_device_is_detected(make: Callable[[Tensor], object]) -> None:
    """torch.tensor syncs. It initialises CUDA before it dispatches, so the error may be a RuntimeError."""
    with pytest.raises((Waits, RuntimeError)):
        steps(spoilt(make), FromViews(), Augment({"all": {}}), rounds=1)


def test_operations_without_sync_are_accepted() -> None:
    for operation in (
        lambda Z: Z * torch.tensor(2.0),
        lambda Z: torch.where(Z > 0, Z, 0),
        lambda Z: Z.masked_fill(Z > 0, 1.0),
        lambda Z: Z + to_device(torch.ones(len(Z), 1), Z.device),
        lambda Z: torch.ones(3).tolist(),
    ):
        steps(spoilt(operation), FromViews(), Augment({"all": {}}), rounds=1)


def test_sync_in_relation_is_detected() -> None:
    class Listed(RelationBuilder):
        def __call__(self, batch: Batch, Z: Tensor) -> Relation:
            i, j = (batch.labels[:, None] == batch.labels).triu(1).nonzero().T
            return relation.ViewExpanded(relation.Edges(i, j, len(batch.labels)), batch.V)

    with pytest.raises(Waits, match="nonzero"):
        steps(VICReg(), Listed(), Augment({"all": {}}), rounds=1)


def test_sync_in_rewired_neighbors_is_detected() -> None:
    """Rewired neighbours are the one relation that is documented to sync."""
    with pytest.raises(Waits, match="from the device to the host"):
        steps(VICReg(), Rewired(FromNeighbors(2)), Augment({"all": {}}), rounds=1)


def test_sync_in_mmcr_is_detected() -> None:
    """MMCR is the one loss that is documented to sync."""
    with pytest.raises(Waits, match="a singular value decomposition"):
        steps(MMCR(), FromViews(), Augment({"all": {}}), rounds=1)


def test_sync_in_views_is_detected() -> None:
    class Masked(Augment):
        def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            X = super().__call__(images, *args, **kwargs)
            chosen = X.mean((1, 2, 3)) > 0
            X[chosen] = X[chosen].flip(-1)
            return X

    with pytest.raises(Waits, match="indexing by a mask"):
        steps(VICReg(), FromViews(), Masked({"all": {}}), rounds=1)


def test_sync_in_optimizer_is_detected() -> None:
    class Careful(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
                super().step()

    with pytest.raises(Waits, match="bool"):
        steps(VICReg(), FromViews(), Augment({"all": {}}), Careful, rounds=1)
