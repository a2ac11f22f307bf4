"""W ranks give the results of one process: losses, gradients, relations, batch norm, views, whole runs."""

import itertools
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner import backbone, cli, distributed
from ssl_runner.batch import ViewTensors, per_size
from ssl_runner.device import choose_device
from ssl_runner.distributed import collectives, group
from ssl_runner.errors import UsageError
from ssl_runner.loss import MMCR, WMSE, BarlowTwins, FroSSL, Loss, SIGReg, SimCLR, SpectralContrastive, VICReg
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.probe import KnnProbe, LinearProbe, RidgeProbe, evaluate, extract, protocol
from ssl_runner.relation import Labels, Relation, SharedLabels, Views, builders
from ssl_runner.runs.files import read_json
from ssl_runner.runs.record import RunRecord
from ssl_runner.solver import Save
from ssl_runner.theory.diagnostics import Diagnostics
from ssl_runner.views import Augment
from tests.helpers import TIMINGS, TINY, TWO_SIZES, complete_rows, pretraining, rows, run_folder, weights
from tests.processes import in_processes
from tests.test_views import FULL


def seeded_sigreg() -> SIGReg:
    torch.manual_seed(0)  # as at the start of a run
    return SIGReg(directions=9)


LOSSES = {
    "vicreg": partial(VICReg, 25.0, 2.0, 10.0),
    "vicreg squared": partial(VICReg, 25.0, 25.0, 10.0, variance="squared"),
    "simclr": SimCLR,
    "simclr sum": partial(SimCLR, 0.2, "sum"),
    "spectral": partial(SpectralContrastive, center=True),
    "spectral sum": partial(SpectralContrastive, "sum"),
    "barlow": partial(BarlowTwins, 0.02),
    "barlow centred": partial(BarlowTwins, 0.02, center=True),
    "simclr negatives": partial(SimCLR, denominator="negatives"),
    "mmcr": MMCR,
    "mmcr with manifolds": partial(MMCR, 0.5),
    "frossl": FroSSL,
    "frossl per view": partial(FroSSL, per_view=True),
    "sigreg": seeded_sigreg,
    "wmse": WMSE,
    "wmse without unit rows": partial(WMSE, unit_rows=False),
}
RELATIONS = ("views", "views normalized", "labels", "labels normalized")
n, K, CLASSES = 8, 6, 3  # images, embedding dimension, classes


def data(V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features (V, n, 5) of V views of n images, labels (n,), and a weight matrix (5, K) to differentiate."""
    generator = torch.Generator().manual_seed(V)
    X = torch.randn(V, n, 5, generator=generator, dtype=dtype) + 0.3
    y = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])  # with four ranks, some have one class only
    return X, y, torch.randn(5, K, generator=generator, dtype=dtype)


def relation(name: str, y: Tensor, V: int) -> Relation:
    normalized = name.endswith("normalized")
    if name.startswith("views"):
        return Views(len(y), V, normalized)
    if name.startswith("shared"):
        Y = torch.stack([y == 0, y != 1, y == 2], 1)
        return SharedLabels(Y.repeat(V, 1), normalized)
    return Labels(y.repeat(V), CLASSES, normalized)


def value_and_gradient(loss: Loss, name: str, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of tanh(X W) on this rank's shard, and the gradient of W averaged over ranks."""
    X, y, W = data(V, dtype)
    part = slice(
        distributed.rank() * n // distributed.world_size(),
        (distributed.rank() + 1) * n // distributed.world_size(),
    )
    W.requires_grad_()
    value = loss((X[:, part].reshape(-1, 5) @ W).tanh(), relation(name, y[part], V))
    value.backward()
    return value.detach(), distributed.all_reduce_sum(W.grad) / distributed.world_size()


CASES = [
    case
    for case in (
        (loss, name, V, dtype)
        for loss, name in itertools.product(LOSSES, RELATIONS)
        for V, dtype in ((2, torch.float64), (4, torch.float64), (2, torch.float32))
    )
    if not (LOSSES[case[0]]().needs_views and case[1].startswith("labels"))
]
CASES += itertools.product(  # of losses that accept any relation
    ("vicreg", "simclr", "spectral sum", "barlow centred"),
    ("shared", "shared normalized"),
    (2, 4),
    (torch.float64,),
)


def table(cases: list) -> list[tuple[Tensor, Tensor]]:
    return [value_and_gradient(LOSSES[loss](), name, V, dtype) for loss, name, V, dtype in cases]


@pytest.mark.parametrize(
    ("W", "cases"),
    [
        (2, CASES),
        (4, [case for case in CASES if case[2:] == (2, torch.float64)]),
        pytest.param(4, CASES, marks=pytest.mark.slow),
    ],
    ids=["2", "4", "4 with all V and dtypes"],
)
def test_loss_and_averaged_gradient_match_single_process(W: int, cases: list) -> None:
    """Parity table: loss × relation × V × W. Relative tolerance 1e-12 in float64, 1e-5 in float32."""
    expected = table(cases)
    for rank in in_processes(W, table, cases):
        for case, (value, gradient), (value_of_one, gradient_of_one) in zip(
            cases, rank, expected, strict=True
        ):
            tolerance = 1e-12 if case[-1] == torch.float64 else 1e-5
            if case[0].startswith("wmse"):  # divides by the square root of the smallest variance
                tolerance *= 10
            assert gradient_of_one.abs().max() > 1e-3, case
            assert abs(value - value_of_one) <= tolerance * abs(value_of_one), case
            assert (gradient - gradient_of_one).norm() <= tolerance * gradient_of_one.norm(), case


def collective_calls() -> dict[str, list[tuple[str, int]]]:
    """Collectives called by each loss in forward and backward: (name, number of entries)."""
    calls: list[tuple[str, int]] = []
    for name in ("all_reduce", collectives.ALL_GATHER, collectives.REDUCE_SCATTER):
        collective = getattr(torch.distributed, name)

        def counted(*tensors: Tensor, name: str = name, collective=collective) -> None:
            calls.append((name, max(tensor.numel() for tensor in tensors)))
            collective(*tensors)

        setattr(torch.distributed, name, counted)
    found = {}
    for loss in (
        "vicreg",
        "barlow",
        "spectral",
        "simclr",
        "simclr negatives",
        "mmcr",
        "frossl",
        "sigreg",
        "wmse",
    ):
        calls.clear()
        Z = torch.randn(40, K, requires_grad=True)
        LOSSES[loss]()(Z, Views(20, 2)).backward()
        found[loss] = sorted(calls)
    return found


@pytest.mark.parametrize("W", [2, 4])
def test_collective_sizes_are_independent_of_batch_size_except_for_simclr_and_mmcr(W: int) -> None:
    """Forward all-reduces sums and K x K moments, and backward communicates nothing of that size.

    MMCR all-reduces one sum of rows, and their number, for each of the images of all ranks. SimCLR
    all-gathers all rows in forward and reduce-scatters their gradients in backward.
    """
    found = in_processes(W, collective_calls)[0]
    sizes = {
        loss: sorted(size for name, size in calls if name == "all_reduce") for loss, calls in found.items()
    }
    assert sizes["vicreg"] == [1, K, K * K]
    assert sizes["barlow"] == [K, K * K]
    assert sizes["spectral"] == [1, 1, 1, *[K] * 4, K * K]  # the mean is subtracted twice
    assert sizes["frossl"] == [1, K * K]
    assert sizes["mmcr"] == [W * 20, W * 20 * K]
    assert sizes["sigreg"] == [1, K, 2 * 16 * 9]  # cosines and sines at 16 knots, for 9 directions
    assert sizes["wmse"] == [1, 1, K, K, K * K, K * K]
    assert all(
        name == "all_reduce"
        for loss in set(found) - {"simclr", "simclr negatives"}
        for name, _ in found[loss]
    )
    gathers = [(collectives.ALL_GATHER, W * 40 * K), (collectives.REDUCE_SCATTER, W * 40 * K)]
    assert [call for call in found["simclr"] if call[0] != "all_reduce"] == gathers
    groups = (collectives.ALL_GATHER, W * 40)
    assert [call for call in found["simclr negatives"] if call[0] != "all_reduce"] == [groups, *gathers]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6)
    ).double()


def two_steps(order: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of a network with batch norm, averaged over ranks and summed over two batches, and its state.

    Each rank has a contiguous shard of the rows in `order`. Row i of the first half of a shard and row i of
    its second half are a positive pair.
    """
    body = distributed.data_parallel(distributed.sync_batchnorm(network()))
    for seed in (0, 1):
        x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        part = x[order].chunk(distributed.world_size())[distributed.rank()]
        VICReg()(body(part), Views(len(part) // 2, 2)).backward()
    inner = body.module if distributed.world_size() > 1 else body
    return [parameter.grad for parameter in inner.parameters()], inner.state_dict()


def test_batch_norm_uses_rows_of_all_ranks() -> None:
    """Positive pairs on three ranks: 0-2, 1-3 | 4-6, 5-7 | 8-10, 9-11. One process has the same pairs."""
    gradients, state = two_steps(torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]))
    assert any("running_mean" in name for name in state)
    for theirs, their_state in in_processes(3, two_steps, torch.arange(12)):
        assert_close(theirs, gradients, rtol=1e-9, atol=1e-9)
        assert_close(their_state, state, rtol=1e-12, atol=1e-12)


def synchronized_timm() -> tuple[Tensor, list[str], bool]:
    torch.manual_seed(0)
    body = backbone.from_timm(3, 16, "resnet10t").double()
    names = list(body.state_dict())
    synchronized = distributed.sync_batchnorm(body)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = distributed.all_gather(
        synchronized(x.chunk(distributed.world_size())[distributed.rank()]).detach()
    )
    return rows, names, list(synchronized.state_dict()) == names


def test_synchronized_batch_norm_keeps_activation_and_parameter_names() -> None:
    expected, names, _ = synchronized_timm()
    for features, their_names, kept in in_processes(2, synchronized_timm):
        assert_close(features, expected, rtol=1e-9, atol=1e-9)
        assert kept
        assert their_names == names


# --- training steps ---

PLAIN = {"affine": {"degrees": 9, "translate": 0.1}, "flip": 0.3}


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize(
    "policies",
    [
        {"all": FULL},
        {"first": FULL, "second": PLAIN},
        {"first": FULL | {"count": 1}, "second": PLAIN | {"count": 2, "size": 12}},
    ],
    ids=["one", "two", "two sizes"],
)
def test_views_of_a_shard_match_those_of_the_whole_batch(parts: int, policies: dict) -> None:
    batch, augment = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8), Augment(policies)

    def views(images: Tensor, *part: int) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(5)
        X = per_size(augment(images, 3, torch.zeros(3), torch.ones(3), generator, *part))
        return [x.unflatten(0, (-1, len(images))) for x in X], torch.rand(2, generator=generator)

    whole, after = views(batch)
    for part, images in enumerate(batch.chunk(parts)):
        own, after_part = views(images, part, parts)
        assert_close(own, [x.chunk(parts, dim=1)[part] for x in whole], rtol=0, atol=1e-6)
        assert torch.equal(after_part, after)


class Mean(Loss):
    """A custom loss without collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"distance": 1.0, "size": 3.0}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return {
            "distance": ((G.degrees[:, None] * Z - G @ Z) * Z).mean(),
            "size": (1 - Z.var(0)).square().sum(),
        }


TRAININGS = {
    "vicreg": lambda: pretraining(VICReg(), builders.FromViews()),
    "vicreg V=3 per view": lambda: pretraining(VICReg(), builders.FromViews(), V=3, per_view=True),
    "simclr labels": lambda: pretraining(SimCLR(), builders.FromLabels()),
    "decoupled simclr": lambda: pretraining(SimCLR(denominator="negatives"), builders.FromViews()),
    "mmcr": lambda: pretraining(MMCR(), builders.FromViews(), V=3),
    "frossl neighbors": lambda: pretraining(FroSSL(per_view=True), builders.FromNeighbors(2)),
    "barlow clipped": lambda: pretraining(BarlowTwins(), builders.FromViews(), clip_grad_norm=0.5),
    "barlow normalized labels": lambda: pretraining(BarlowTwins(), builders.FromLabels(True)),
    "neighbors": lambda: pretraining(SimCLR(), builders.FromNeighbors(2)),
    "queue": lambda: pretraining(VICReg(), builders.FromNeighbors(2, queue=30)),
    "noisy labels": lambda: pretraining(VICReg(), builders.Rewired(builders.FromLabels(), 0.5)),
    "custom loss": lambda: pretraining(Mean(), builders.FromViews()),
    "views of two sizes": lambda: pretraining(VICReg(), V=5, augment=Augment(TWO_SIZES)),
    "two sizes, neighbors": lambda: pretraining(
        VICReg(), builders.FromNeighbors(2), V=5, augment=Augment(TWO_SIZES), per_view=True
    ),
    "images on the host": lambda: pretraining(VICReg(), builders.FromLabels(), storage="host"),
}


def curves(names: list[str]) -> list[tuple[list[dict], dict[str, Tensor]]]:
    """Metrics and final weights of each training run, in float64 so that rounding errors stay small."""
    trained = []
    for name in names:
        training = TRAININGS[name]()
        model, loader = training.model.double(), training.loader
        training.relation.bind(loader.data.pretrain.labels)
        loader.augment = Doubled(loader.augment)
        model.backbone = distributed.sync_batchnorm(model.backbone)
        model.projector = distributed.sync_batchnorm(model.projector)
        training.network = distributed.data_parallel(model)
        trained.append((rows(training), weights(training)))
    return trained


class Doubled:
    """Wrap an Augment to return views in float64."""

    def __init__(self, augment: Augment):
        self.augment = augment

    def __call__(self, *arguments: object, **options: object) -> ViewTensors:
        X = [x.double() for x in per_size(self.augment(*arguments, **options))]
        return X if len(X) > 1 else X[0]


# all-gathered rows are float32
ALL_GATHERED = (
    *("neighbors", "two sizes, neighbors", "frossl neighbors"),
    *("queue", "custom loss", "noisy labels"),
)


@pytest.mark.parametrize("W", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_curve_matches_single_process(W: int) -> None:
    """All relations, including those that need all rows, and a custom loss without collectives."""
    expected = curves(list(TRAININGS))
    for results in in_processes(W, curves, list(TRAININGS)):
        for name, (table, state), (table_of_one, state_of_one) in zip(
            TRAININGS, results, expected, strict=True
        ):
            loose = name in ALL_GATHERED

            def message(text: str, name: str = name) -> str:
                return f"{name}: {text}"

            assert_close(table, table_of_one, rtol=1e-4 if loose else 1e-6, atol=1e-6, msg=message)
            assert_close(state, state_of_one, rtol=1e-2, atol=1e-3 if loose else 1e-5, msg=message)


# --- probes, diagnostics, Python objects, failures ---


def evaluations() -> tuple[Tensor, list[dict], list[dict], list[dict]]:
    """Features, probe rows, diagnostics and spectrum of one model. Rank 0 alone has all diagnostics."""
    training = pretraining()
    model, loader, data = training.model, training.loader, training.loader.data
    with mock.patch.object(protocol, "BATCH_VALUES", 7 * 48):  # several batches of 7 images on every rank
        features = extract(model.backbone, data.train, data.mean, data.std)
    classifiers = {"linear": LinearProbe, "knn": KnnProbe, "ridge": RidgeProbe}
    probes = list(evaluate("backbone", model.backbone, data, classifiers, score_test=True))
    neighbors = builders.FromNeighbors(2)
    neighbors.bind(data.pretrain.labels)
    diagnose = Diagnostics(loader, neighbors, training.loss, Path(), every=1, num_images=30)
    columns = diagnose.evaluate(model, epoch=1)
    untimed = [{name: value for name, value in row.items() if name != "seconds"} for row in probes]
    return features, untimed, [{**columns, "diagnostics_s": 0}], diagnose.spectrum(model)


@pytest.mark.parametrize("W", [2, 5])
def test_probes_and_diagnostics_match_single_process(W: int) -> None:
    """With five ranks, some have no work."""
    features, probes, columns, spectrum = evaluations()
    for rank, theirs in enumerate(in_processes(W, evaluations)):
        assert torch.equal(theirs[0], features)
        assert theirs[1] == probes
        empty = [{**dict.fromkeys(Diagnostics.columns), "diagnostics_s": 0}]
        for ours, table in zip((columns, spectrum) if rank == 0 else (empty, []), theirs[2:], strict=True):
            # the summation order depends on the number of threads
            pd.testing.assert_frame_equal(pd.DataFrame(table), pd.DataFrame(ours), rtol=1e-6)


def maxima() -> list[int]:
    maximum = distributed.AsyncMax()
    return [
        maximum(value) for value in ((0, 0, 2, 0, 0, 0) if distributed.rank() == 1 else (0, 1, 0, 0, 0, 0))
    ]


def test_async_max_returns_same_value_on_all_ranks_at_each_call() -> None:
    first, second, third = in_processes(3, maxima)
    assert first == second == third == [0, 0, 1, 2, 0, 0]


def random_numbers() -> Tensor:
    torch.manual_seed(0)
    pretraining(dropout=0.5)
    return torch.rand(5)


def test_dropout_random_states_differ_between_ranks() -> None:
    first, second = in_processes(2, random_numbers)
    assert not torch.equal(first, second)


def fail_on_rank_1(folder: Path, how: str) -> str:
    """Type and message of the exception on this rank when rank 1 raises within `propagate_failures`."""
    try:
        with Preemption(), RunRecord(folder, "x") as record, distributed.propagate_failures(record.fail):
            record.begin()
            if how == "terminated" and distributed.rank() == 0:  # by torchrun, once rank 1 has exited
                update = record.update
                record.update = lambda **facts: (signal.raise_signal(signal.SIGTERM), update(**facts))
            if distributed.rank() == 1:
                if how == "preempted":
                    raise Preempted("preempted by SIGTERM")
                raise (UsageError if how == "refused" else KeyError)("no such thing")
            distributed.all_reduce_sum(torch.ones(3))
    except BaseException as error:
        group._group.ended.set()  # stop the watching thread: this process exits by itself
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("how", "words", "status"),
    [
        ("refused", "PeerFailed: rank 1 of 2: no such thing", "failed"),
        ("raised", "PeerFailed: rank 1 of 2: KeyError: 'no such thing'", "failed"),
        ("terminated", "PeerFailed: rank 1 of 2: KeyError: 'no such thing'", "failed"),
        ("preempted", "Preempted: preempted by SIGTERM", "preempted"),
    ],
)
def test_failure_on_one_rank_ends_the_others_with_its_message(
    how: str, words: str, status: str, tmp_path: Path
) -> None:
    first, _ = in_processes(2, fail_on_rank_1, tmp_path, how)
    assert first == words
    record = read_json(tmp_path / "run.json")
    assert record["status"] == status
    assert record["processes"] == 2


def test_rank_info_reads_torchrun_and_slurm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.rank_info() is None
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # set in the batch script itself, which is not a task of a step
    assert distributed.rank_info() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert distributed.rank_info() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert distributed.rank_info() == distributed.RankInfo(3, 4, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.rank_info() == distributed.RankInfo(2, 8, 0)
    with pytest.raises(UsageError, match="device=cuda:1: one device for 8 processes"):
        choose_device("cuda:1", distributed.rank_info())


# --- command line ---


def torchrun(W: int, command: str, cwd: Path) -> subprocess.Popen:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={W}",
        "-m",
        "ssl_runner",
    ]
    return subprocess.Popen(
        [*launcher, *command.split()], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_run_under_torchrun_matches_single_process(ssl_run, tmp_path: Path) -> None:
    command = (
        f"{TINY} batch_size=48 relation=labels epochs=3 probe.every=1 probe.probes=[linear,knn]"
        " embedding.method=pca"
    )
    whole = run_folder(ssl_run(f"{command} hydra.run.dir=one")[1])
    out, err = torchrun(2, f"{command} hydra.run.dir=several", tmp_path).communicate()
    several = tmp_path / "several"
    assert run_folder(out) == several, err
    assert "| 2 x cpu fp32" in out
    assert out.count("top1=") == 1
    assert read_json(several / "run.json")["processes"] == 2
    tables = [
        pd.read_csv(folder / "metrics.csv").drop(columns=list(TIMINGS), errors="ignore")
        for folder in (whole, several)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, check_dtype=False)
    probes = [pd.read_csv(folder / "probe.csv") for folder in (whole, several)]
    assert (probes[0][["epoch", "probe", "eval_split"]] == probes[1][["epoch", "probe", "eval_split"]]).all(
        axis=None
    )
    assert (probes[0].top1 - probes[1].top1).abs().max() < 0.11  # `val` has 20 images
    maps = [pd.read_csv(folder / "embedding.csv")[["index", "label"]] for folder in (whole, several)]
    pd.testing.assert_frame_equal(*maps)
    assert sorted(path.name for path in several.iterdir()) == sorted(path.name for path in whole.iterdir())
    process = torchrun(2, f"{command} hydra.run.dir=several resume=auto", tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("already done")


def test_sweep_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-run", "-m", "gamma=1,2"])
    with pytest.raises(UsageError, match="start it without torchrun or srun"):
        cli.execute(2, [])


@pytest.mark.slow
def test_all_ranks_exit_on_an_error(tmp_path: Path) -> None:
    """The error occurs on one rank, on all ranks, or on rank 0 before the others have received a task."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from ssl_runner.backbone import convnet\n"
        "def fragile(channels, image_size):\n"
        "    body = convnet(channels, image_size, [8])\n"
        "    def check(module, args):\n"
        "        if torch.distributed.get_rank() == 1 and module.training:\n"
        "            raise MemoryError('too large for this one')\n"
        "    body.register_forward_pre_hook(check)\n"
        "    return body\n"
    )
    (tmp_path / "conf" / "backbone").mkdir(parents=True)
    (tmp_path / "conf" / "backbone" / "fragile.yaml").write_text("_target_: mine.fragile\n")
    tiny = TINY.replace("backbone.widths=[8,16]", "")
    commands = {
        f"--config-dir conf backbone=fragile {tiny} hydra.run.dir=broken":
            "PeerFailed: rank 1 of 2: MemoryError: too large for this one",
        f"{TINY} batch_size=49": "batch_size=49: expected a multiple of 2, the number of processes",
        f"{TINY} gama=3": "Unknown option 'gama'. Did you mean 'gamma'?",
    }  # fmt: skip
    for command, words in commands.items():
        start = time.monotonic()
        process = torchrun(2, command, tmp_path)
        out, err = process.communicate()
        assert process.returncode == 1
        assert words.removeprefix("PeerFailed: ") in err
        assert time.monotonic() - start < 60
        assert "top1=" not in out
    record = read_json(tmp_path / "broken" / "run.json")
    assert (record["status"], record["error"]) == (
        "failed",
        "PeerFailed: rank 1 of 2: MemoryError: too large for this one",
    )


@pytest.mark.slow
def test_preempted_run_resumes_with_another_world_size(ssl_run, tmp_path: Path) -> None:
    """World sizes 2, 1 and 2, preempted after the first two. The curve matches that of a single process."""
    command = f"{TINY} gamma=25 epochs=60 resume=auto"
    whole = run_folder(ssl_run(f"{command} hydra.run.dir=whole")[1])
    folder = tmp_path / "mine"
    for W, epochs in ((2, 10), (1, 25)):
        process = torchrun(W, f"{command} hydra.run.dir=mine", tmp_path)
        while process.poll() is None and not (len(complete_rows(folder / "metrics.csv")) >= epochs):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert read_json(folder / "run.json")["status"] == "preempted", err
        assert "preempted" in err
    out, err = torchrun(2, f"{command} hydra.run.dir=mine", tmp_path).communicate()
    assert run_folder(out) == folder, err
    assert read_json(folder / "run.json")["starts"] == 3
    curve, expected = (pd.read_csv(path / "metrics.csv") for path in (folder, whole))
    assert (curve.epoch == expected.epoch).all()
    # rounding errors accumulate
    assert curve.loss.to_numpy() == pytest.approx(expected.loss.to_numpy(), rel=0.05)


class OwnTerms(VICReg):
    """A custom subclass of a loss, with statistics over the rows of this rank only."""

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return super()._terms(Z, G) | {"variance": (1 - Z.std(0)).relu().sum()}


class OwnRelation(builders.FromViews):
    def __call__(self, batch, Z):
        return super().__call__(batch, Z)


def test_subclasses_do_not_inherit_sharding() -> None:
    assert VICReg.supports_sharding
    assert builders.FromViews.shardable
    assert not OwnTerms.supports_sharding
    assert not OwnRelation.shardable


def save_slowly(folder: Path) -> str:
    """Status of a preempted run whose checkpoint takes longer to write than the grace period."""
    group._group.grace = 0.5
    training = pretraining(epochs=2)

    def save(state: dict, how: Save) -> None:
        if distributed.is_main_process():
            time.sleep(3)
            (folder / "saved").touch()

    training.save = save
    training.preemption.received = signal.SIGUSR1
    try:
        with Preemption(), RunRecord(folder, "x") as record, distributed.propagate_failures(record.fail):
            record.begin()
            list(training.epochs())
    except Preempted:
        group._group.ended.set()
        return read_json(folder / "run.json")["status"]
    return "not preempted"


def test_no_rank_exits_before_the_checkpoint_is_written(tmp_path: Path) -> None:
    first, _ = in_processes(2, save_slowly, tmp_path)
    assert first == "preempted"
    assert (tmp_path / "saved").exists()


def failure_during_rendezvous() -> list[str]:
    """Messages received by rank 1 while its main thread waits in the store, as NCCL does when it connects."""
    received: list[str] = []
    group._group.grace = 0.1
    group._group.on_peer_failure = lambda code, message: received.append(message)
    store = group._group.store
    with mock.patch.object(group.os, "_exit"):
        if distributed.rank() == 0:
            distributed.report_failure(KeyError("out of order"))
        with suppress(RuntimeError):
            store.wait([f"never set, rank {distributed.rank()}"], timedelta(seconds=2.5))
        at_end = list(received)
    group._group.ended.set()
    return at_end


def test_failure_reaches_a_rank_that_waits_in_the_store() -> None:
    _, second = in_processes(2, failure_during_rendezvous)
    assert second == ["rank 0 of 2: KeyError: 'out of order'"]


def test_process_exits_with_the_message_of_the_rank_that_failed(capsys, monkeypatch) -> None:
    """Also if the files of the run, such as one that another user owns, cannot be removed."""
    monkeypatch.setattr(group, "POLL_INTERVAL", 0)
    exits = mock.Mock()
    monkeypatch.setattr(group.os, "_exit", exits)
    watching = object.__new__(group._Group)
    watching.rank, watching.grace, watching.ended = 0, 0, threading.Event()
    watching.watched = mock.Mock(get=lambda key: b"75 preempted by SIGTERM")
    watching.on_peer_failure = mock.Mock(side_effect=PermissionError)
    with pytest.raises(PermissionError):
        watching.watch()
    exits.assert_called_once_with(75)
    assert capsys.readouterr().err == "preempted by SIGTERM\n"


GPUS = {  # name -> the GPU of each of four ranks: PCI bus and UUID; without a bus as before torch 2.8
    "separate": [(1, "a"), (2, "b"), (3, "c"), (4, "d")],
    "shared": [(1, "a"), (2, "b"), (1, "a"), (2, "b")],
    "parts of one by MIG": [(1, "a"), (2, "b"), (3, "c"), (3, "d")],
    "by UUID": [(None, "a"), (None, "b"), (None, "c"), (None, "a")],
}


def check_gpus(name: str) -> str | None:
    """The message with which this rank refuses its GPU, or None."""
    bus, uuid = GPUS[name][distributed.rank()]
    properties = SimpleNamespace(uuid=uuid)
    if bus is not None:
        properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id = 0, bus, 0
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        try:
            distributed.check_devices(torch.device("cuda", 0))
        except UsageError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("separate", []),
        ("shared", ["ranks 0, 2", "ranks 1, 3"]),
        ("parts of one by MIG", ["ranks 2, 3"]),
        ("by UUID", ["ranks 0, 3"]),
    ],
)
def test_gpu_shared_by_ranks_is_refused_on_all_of_them(name: str, ranks: list[str]) -> None:
    messages = set(in_processes(4, check_gpus, name))
    if not ranks:
        assert messages == {None}
        return
    (message,) = messages
    host = platform.node()
    shared = "; ".join(f"{those} share one GPU of {host}" for those in ranks)
    assert message == (
        f"device=cuda: expected one GPU for each process, but {shared};"
        " start at most one process per GPU, or use device=cpu"
    )


def check_mixture() -> str | None:
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(uuid="a")):
        try:
            distributed.check_devices(torch.device("cpu" if distributed.rank() else "cuda"))
        except UsageError as error:
            return str(error)
    return None


def test_devices_of_different_kinds_are_refused() -> None:
    first, second = in_processes(2, check_mixture)
    assert first == second
    host = platform.node()
    assert first.startswith(
        "device=auto: expected one kind of device on all ranks,"
        f" found rank 0 on {host}: cuda, rank 1 on {host}: cpu; use device=cpu"
    )


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", distributed.RankInfo(1, 3, 1)) == torch.device("cuda", 1)
    with pytest.raises(UsageError) as refused:
        choose_device("auto", distributed.RankInfo(6, 8, 2))
    assert str(refused.value) == (
        "device=cuda: expected at most 2 processes on this machine, one per GPU, but rank 6 is its process 3;"
        " start fewer processes, or use device=cpu"
    )
