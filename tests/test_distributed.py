"""Several processes compute what one does: losses, gradients, relations, batch norm, views, whole runs."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_runner import backbone, distributed, relate, replica
from ssl_runner.diagnostics import Diagnostics
from ssl_runner.errors import Refused
from ssl_runner.loss import BarlowTwins, Loss, SimCLR, SquaredSimCLR, VICReg
from ssl_runner.metrics import read_json
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.probe import extract, probe
from ssl_runner.record import Record
from ssl_runner.relation import Labels, Relation, Views
from ssl_runner.train import choose_device
from ssl_runner.views import Augment
from tests.conftest import TINY, run_folder
from tests.processes import in_processes
from tests.test_train import pretraining, rows, weights
from tests.test_views import FULL

LOSSES = {
    "vicreg": partial(VICReg, 25.0, 2.0, 10.0),
    "vicreg squared": partial(VICReg, 25.0, 25.0, 10.0, variance="squared"),
    "simclr": SimCLR,
    "simclr sum": partial(SimCLR, 0.2, "sum"),
    "simclr_squared": partial(SquaredSimCLR, center=True),
    "barlow": partial(BarlowTwins, 0.02),
    "barlow centred": partial(BarlowTwins, 0.02, center=True),
}
RELATIONS = ("views", "views normalized", "labels", "labels normalized")
n, K, CLASSES = 8, 6, 3  # originals, columns, classes


def data(V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features (V, n, 5) of V views of n originals, their labels, and a matrix whose gradient is asked for."""
    generator = torch.Generator().manual_seed(V)
    X = torch.randn(V, n, 5, generator=generator, dtype=dtype) + 0.3
    y = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])  # in four processes, some have one class only
    return X, y, torch.randn(5, K, generator=generator, dtype=dtype)


def relation(name: str, y: Tensor, V: int) -> Relation:
    normalized = name.endswith("normalized")
    if name.startswith("views"):
        return Views(len(y), V, normalized)
    return Labels(y.repeat(V), CLASSES, normalized)


def value_and_gradient(loss: Loss, name: str, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of X W over this process's part of the rows, and the gradient of W averaged over the processes."""
    X, y, W = data(V, dtype)
    part = slice(
        distributed.rank() * n // distributed.size(), (distributed.rank() + 1) * n // distributed.size()
    )
    W.requires_grad_()
    value = loss((X[:, part].reshape(-1, 5) @ W).tanh(), relation(name, y[part], V))
    value.backward()
    return value.detach(), distributed.summed(W.grad) / distributed.size()


CASES = list(itertools.product(LOSSES, RELATIONS, (2, 4), (torch.float64, torch.float32)))


def table() -> list[tuple[Tensor, Tensor]]:
    return [value_and_gradient(LOSSES[loss](), name, V, dtype) for loss, name, V, dtype in CASES]


@pytest.mark.parametrize("W", [2, 4])
def test_the_averaged_gradient_of_several_processes_is_that_of_one(W: int) -> None:
    """The parity table: loss x relation x V x W. In float64 to 1e-12 of the largest entry, in float32 to 1e-5."""
    expected = table()
    for rank in in_processes(W, table):
        for case, (value, gradient), (value_of_one, gradient_of_one) in zip(
            CASES, rank, expected, strict=True
        ):
            tolerance = 1e-12 if case[-1] == torch.float64 else 1e-5
            assert gradient_of_one.abs().max() > 1e-3, case
            assert abs(value - value_of_one) <= tolerance * abs(value_of_one), case
            assert (gradient - gradient_of_one).norm() <= tolerance * gradient_of_one.norm(), case


def exchanged() -> dict[str, list[tuple[str, int]]]:
    """What each loss hands to collectives, forward and backward: their names and the numbers of entries."""
    calls: list[tuple[str, int]] = []
    for name in ("all_reduce", distributed.ALL_GATHER, distributed.REDUCE_SCATTER):
        collective = getattr(torch.distributed, name)

        def counted(*tensors: Tensor, name: str = name, collective=collective) -> None:
            calls.append((name, max(tensor.numel() for tensor in tensors)))
            collective(*tensors)

        setattr(torch.distributed, name, counted)
    found = {}
    for loss in ("vicreg", "barlow", "simclr_squared", "simclr"):
        calls.clear()
        Z = torch.randn(40, K, requires_grad=True)
        LOSSES[loss]()(Z, Views(20, 2)).backward()
        found[loss] = sorted(calls)
    return found


@pytest.mark.parametrize("W", [2, 4])
def test_moments_are_exchanged_whose_size_does_not_depend_on_the_number_of_rows(W: int) -> None:
    """K x K moments and sums forward, nothing of that size back; SimCLR: all rows forward, their gradients back."""
    found = in_processes(W, exchanged)[0]
    sizes = {
        loss: sorted(size for name, size in calls if name == "all_reduce") for loss, calls in found.items()
    }
    assert sizes["vicreg"] == [1, K, K * K]
    assert sizes["barlow"] == [K, K * K]
    assert sizes["simclr_squared"] == [1, 1, K, K, K * K, K * K]
    assert all(
        name == "all_reduce" for loss in ("vicreg", "barlow", "simclr_squared") for name, _ in found[loss]
    )
    gathers = [call for call in found["simclr"] if call[0] != "all_reduce"]
    assert gathers == [(distributed.ALL_GATHER, W * 40 * K), (distributed.REDUCE_SCATTER, W * 40 * K)]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6)
    ).double()


def two_steps(order: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Averaged gradients of a network with batch norm, summed over two batches, and its state. Of the rows in `order` this
    process has its part, the first half of which are views of what the second half shows."""
    body = replica.averaging(replica.synchronized(network()))
    for seed in (0, 1):
        x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        part = x[order].chunk(distributed.size())[distributed.rank()]
        VICReg()(body(part), Views(len(part) // 2, 2)).backward()
    inner = body.module if distributed.size() > 1 else body
    return [parameter.grad for parameter in inner.parameters()], inner.state_dict()


def test_batch_norm_is_taken_over_the_rows_of_all_processes() -> None:
    """Three processes pair the rows 0-2, 1-3 | 4-6, 5-7 | 8-10, 9-11: as one process does with these rows reordered."""
    gradients, state = two_steps(torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]))
    assert any("running_mean" in name for name in state)
    for theirs, their_state in in_processes(3, two_steps, torch.arange(12)):
        assert_close(theirs, gradients, rtol=1e-9, atol=1e-9)
        assert_close(their_state, state, rtol=1e-12, atol=1e-12)


def synchronized_timm() -> tuple[Tensor, list[str], bool]:
    torch.manual_seed(0)
    body = backbone.from_timm(3, 16, "resnet10t").double()
    names = list(body.state_dict())
    synchronized = replica.synchronized(body)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = distributed.gathered(synchronized(x.chunk(distributed.size())[distributed.rank()]).detach())
    return rows, names, list(synchronized.state_dict()) == names


def test_batch_norms_that_hold_an_activation_keep_it_and_their_names() -> None:
    expected, names, _ = synchronized_timm()
    for features, their_names, kept in in_processes(2, synchronized_timm):
        assert_close(features, expected, rtol=1e-9, atol=1e-9)
        assert kept
        assert their_names == names


# --- what a step is made of ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("policies", [1, 2])
def test_the_views_of_a_part_of_a_batch_are_those_in_the_whole(parts: int, policies: int) -> None:
    originals = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8)
    plain = {"affine": {"degrees": 9, "translate": 0.1}, "flip": 0.3}
    augment = Augment({"all": FULL} if policies == 1 else {"first": FULL, "second": plain})

    def views(images: Tensor, *part: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        X = augment(images, 3, torch.zeros(3), torch.ones(3), generator, *part)
        return X.unflatten(0, (3, -1)), torch.rand(2, generator=generator)

    whole, after = views(originals)
    for part, images in enumerate(originals.chunk(parts)):
        own, after_part = views(images, part, parts)
        assert_close(own, whole.chunk(parts, dim=1)[part], rtol=0, atol=1e-6)
        assert torch.equal(after_part, after)


class Mean(Loss):
    """A user's loss, which knows nothing of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"distance": 1.0, "size": 3.0}

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return {
            "distance": ((G.degrees[:, None] * Z - G @ Z) * Z).mean(),
            "size": (1 - Z.var(0)).square().sum(),
        }


TRAININGS = {
    "vicreg": lambda: pretraining(VICReg(), relate.Views()),
    "vicreg V=3 separate": lambda: pretraining(VICReg(), relate.Views(), V=3, separate=True),
    "simclr labels": lambda: pretraining(SimCLR(), relate.Labels()),
    "barlow clipped": lambda: pretraining(BarlowTwins(), relate.Views(), clip=0.5),
    "barlow normalized labels": lambda: pretraining(BarlowTwins(), relate.Labels(True)),
    "neighbors": lambda: pretraining(SimCLR(), relate.Neighbors(2)),
    "queue": lambda: pretraining(VICReg(), relate.Neighbors(2, queue=30)),
    "noisy labels": lambda: pretraining(VICReg(), relate.Noisy("labels", 0.5)),
    "a user's loss": lambda: pretraining(Mean(), relate.Views()),
    "images on the host": lambda: pretraining(VICReg(), relate.Labels(), location="host"),
}


def curves(names: list[str]) -> list[tuple[list[dict], dict[str, Tensor]]]:
    """The table and the weights of each training; float64 networks, so that roundings do not grow into differences."""
    trained = []
    for name in names:
        training = TRAININGS[name]()
        training.relation.bind(training.data.pretrain.labels)
        training.backbone.double()
        training.projector.double()
        training.augment = Doubled(training.augment)
        training.backbone = replica.synchronized(training.backbone)
        training.projector = replica.synchronized(training.projector)
        training.network = replica.averaging(nn.Sequential(training.backbone, training.projector))
        trained.append((rows(training), weights(training)))
    return trained


class Doubled:
    """Views in float64."""

    def __init__(self, augment: Augment):
        self.augment = augment

    def __call__(self, *arguments: object, **options: object) -> Tensor:
        return self.augment(*arguments, **options).double()


TOLERANCE = dict.fromkeys(
    ("neighbors", "queue", "a user's loss", "noisy labels"), 1e-4
)  # gathered rows are float32


@pytest.mark.parametrize("W", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_training_of_several_processes_has_the_loss_curve_of_one(W: int) -> None:
    """For every relation, those that need all rows too, and for a loss that was written without a thought of processes."""
    expected = curves(list(TRAININGS))
    for results in in_processes(W, curves, list(TRAININGS)):
        for name, (table, state), (table_of_one, state_of_one) in zip(
            TRAININGS, results, expected, strict=True
        ):
            loose = name in ("neighbors", "queue", "a user's loss", "noisy labels")
            assert_close(
                table,
                table_of_one,
                rtol=1e-4 if loose else 1e-6,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            assert_close(
                state,
                state_of_one,
                rtol=1e-2,
                atol=1e-3 if loose else 1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# --- probes, diagnostics, and what is no tensor -------------------------------------------------------------------------------


def looked_at() -> tuple[Tensor, list[dict], list[dict], list[dict]]:
    """Features, probes and diagnostics of one network, as the process that writes has them."""
    training = pretraining()
    network = training.backbone
    features = extract(network, training.data.train, training.data.mean, training.data.std, batch_size=7)
    probes = list(probe("backbone", network, training.data, ["linear", "knn", "ridge"], score_test=True))
    training.relation.bind(training.data.pretrain.labels)
    settings = {"V": 2, "images": 30, "seed": 0, "fixed": False}
    looks = Diagnostics(training.data, training.augment, relate.Neighbors(2), training.loss, **settings)
    columns = looks(network, training.projector)
    spectrum = looks.spectrum(network, training.projector)
    dropped = [{name: value for name, value in row.items() if name != "seconds"} for row in probes]
    return features, dropped, [{**columns, "diagnostics_s": 0}], spectrum


@pytest.mark.parametrize("W", [2, 5])
def test_probes_and_diagnostics_give_the_numbers_of_one_process(W: int) -> None:
    """With five processes some have nothing to do."""
    features, probes, columns, spectrum = looked_at()
    for rank, theirs in enumerate(in_processes(W, looked_at)):
        assert torch.equal(theirs[0], features)
        assert theirs[1] == probes
        for ours, table in zip(
            (columns, spectrum) if rank == 0 else ([{"diagnostics_s": 0}], []), theirs[2:], strict=True
        ):
            pd.testing.assert_frame_equal(
                pd.DataFrame(table), pd.DataFrame(ours), rtol=1e-6
            )  # threads sum in another order


def asked() -> list[int]:
    vote = distributed.Vote()
    return [
        vote(request) for request in ((0, 0, 2, 0, 0, 0) if distributed.rank() == 1 else (0, 1, 0, 0, 0, 0))
    ]


def test_all_processes_agree_at_the_same_call() -> None:
    first, second, third = in_processes(3, asked)
    assert first == second == third == [0, 0, 1, 2, 0, 0]


def dropped_rows() -> Tensor:
    torch.manual_seed(0)
    pretraining(dropout=0.5)
    return torch.rand(5)


def test_what_is_dropped_from_one_process_is_not_from_another() -> None:
    first, second = in_processes(2, dropped_rows)
    assert not torch.equal(first, second)


def one_fails(folder: Path, how: str) -> str:
    """What this process ends with when process 1 raises, in a context that all share."""
    try:
        with Record(folder, "x") as record, distributed.together(record.lost):
            if distributed.rank() == 1:
                if how == "preempted":
                    raise Preempted("preempted by SIGTERM")
                raise (Refused if how == "refused" else KeyError)("no such thing")
            distributed.summed(torch.ones(3))
    except BaseException as error:
        distributed._group.ended.set()  # this process is about to end by itself
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("how", "words", "status"),
    [
        ("refused", "Lost: process 1 of 2: no such thing", "failed"),
        ("raised", "Lost: process 1 of 2: KeyError: 'no such thing'", "failed"),
        ("preempted", "Preempted: preempted by SIGTERM", "preempted"),
    ],
)
def test_one_that_fails_ends_the_others_which_say_why(
    how: str, words: str, status: str, tmp_path: Path
) -> None:
    first, _ = in_processes(2, one_fails, tmp_path, how)
    assert first == words
    record = read_json(tmp_path / "run.json")
    assert record["status"] == status
    assert record["processes"] == 2


def test_where_a_launcher_has_put_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.place() is None
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script, which is no task of a step
    assert distributed.place() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert distributed.place() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert distributed.place() == distributed.Place(3, 4, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.place() == distributed.Place(2, 8, 0)
    with pytest.raises(Refused, match="device=cuda:1 is one device, and 8 processes train"):
        choose_device("cuda:1")


# --- through the command line -------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("W", [2, 4])
def test_a_run_under_torchrun_is_the_run_of_one_process(W: int, ssl_run, tmp_path: Path) -> None:
    command = f"{TINY} batch_size=48 relation=labels epochs=3 probe.every=1 probe.probes=[linear,knn]"
    whole = run_folder(ssl_run(f"{command} hydra.run.dir=one")[1])
    out, err = torchrun(W, f"{command} hydra.run.dir=several", tmp_path).communicate()
    several = tmp_path / "several"
    assert run_folder(out) == several, err
    assert f"| {W} x cpu fp32" in out
    assert out.count("top1=") == 1
    assert read_json(several / "run.json")["processes"] == W
    tables = [
        pd.read_csv(folder / "metrics.csv").drop(columns=["seconds", "images_per_s", "diagnostics_s"])
        for folder in (whole, several)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, check_dtype=False)
    probes = [pd.read_csv(folder / "probe.csv") for folder in (whole, several)]
    assert (probes[0][["epoch", "probe", "eval_split"]] == probes[1][["epoch", "probe", "eval_split"]]).all(
        axis=None
    )
    assert (probes[0].top1 - probes[1].top1).abs().max() < 0.11  # 20 images validate
    assert sorted(path.name for path in several.iterdir()) == sorted(path.name for path in whole.iterdir())
    if W == 2:  # there is nothing to do
        process = torchrun(W, f"{command} hydra.run.dir=several resume=auto", tmp_path)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.startswith("done already")


@pytest.mark.slow
def test_all_processes_end_together_on_an_error(tmp_path: Path) -> None:
    """One process breaks; all refuse; the first one refuses before the others know of anything."""
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
    commands = {
        f"--config-dir conf backbone=fragile {TINY.replace('backbone.widths=[8,16]', '')} hydra.run.dir=broken":
            "Lost: process 1 of 2: MemoryError: too large for this one",
        f"{TINY} batch_size=49": "batch_size=49 is shared by 2 processes: give a multiple of 2",
        f"{TINY} gama=3": "gama is not a setting; did you mean gamma?",
        f"-m {TINY} gamma=1,2": "start it without torchrun or srun",
    }  # fmt: skip
    for command, words in commands.items():
        start = time.monotonic()
        process = torchrun(2, command, tmp_path)
        out, err = process.communicate()
        assert process.returncode == 1
        assert words.removeprefix("Lost: ") in err
        assert time.monotonic() - start < 60
        assert "top1=" not in out
    record = read_json(tmp_path / "broken" / "run.json")
    assert (record["status"], record["error"]) == (
        "failed",
        "Lost: process 1 of 2: MemoryError: too large for this one",
    )


@pytest.mark.slow
def test_a_preempted_run_goes_on_with_another_number_of_processes(ssl_run, tmp_path: Path) -> None:
    """Two processes are asked to end, one goes on and is asked, too, and two finish: with the curve of one process."""
    command = f"{TINY} gamma=25 epochs=60 resume=auto"
    whole = run_folder(ssl_run(f"{command} hydra.run.dir=whole")[1])
    folder = tmp_path / "mine"
    for W, epochs in ((2, 10), (1, 25)):
        process = torchrun(W, f"{command} hydra.run.dir=mine", tmp_path)
        while process.poll() is None and not (len(written(folder / "metrics.csv")) >= epochs):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert read_json(folder / "run.json")["status"] == "preempted", err
        assert "the run can go on" in err
    out, err = torchrun(2, f"{command} hydra.run.dir=mine", tmp_path).communicate()
    assert run_folder(out) == folder, err
    assert read_json(folder / "run.json")["starts"] == 3
    curve, expected = (pd.read_csv(path / "metrics.csv") for path in (folder, whole))
    assert (curve.epoch == expected.epoch).all()
    assert curve.loss.to_numpy() == pytest.approx(expected.loss.to_numpy(), rel=0.05)  # roundings grow


def written(path: Path) -> pd.DataFrame:
    """The whole lines of a CSV that may be being written."""
    return (
        pd.read_csv(io.StringIO(path.read_text().rpartition("\n")[0]))
        if path.exists() and path.stat().st_size
        else pd.DataFrame()
    )


class OwnTerms(VICReg):
    """A user's change of a shipped loss: means over its own rows."""

    def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
        return super()._terms(Z, G) | {"variance": (1 - Z.std(0)).relu().sum()}


class OwnRelation(relate.Views):
    def __call__(self, batch, Z):
        return super().__call__(batch, Z)


def test_what_is_changed_makes_no_claim_of_its_parent() -> None:
    assert VICReg.reduces
    assert relate.Views.divides
    assert not OwnTerms.reduces
    assert not OwnRelation.divides


def slow_to_save(folder: Path) -> str:
    """A preempted training whose checkpoint takes longer than another process has patience with one that has ended."""
    distributed._group.grace = 0.5
    training = pretraining(epochs=2)

    def save(state: dict) -> None:
        if distributed.leads():
            time.sleep(3)
            (folder / "saved").touch()

    training.save = save
    training.preemption.asked = signal.SIGUSR1
    try:
        with Preemption(), Record(folder, "x") as record, distributed.together(record.lost):
            list(training.epochs())
    except Preempted:
        distributed._group.ended.set()
        return read_json(folder / "run.json")["status"]
    return "went on"


def test_no_process_ends_before_the_checkpoint_is_written(tmp_path: Path) -> None:
    first, _ = in_processes(2, slow_to_save, tmp_path)
    assert first == "preempted"
    assert (tmp_path / "saved").exists()
