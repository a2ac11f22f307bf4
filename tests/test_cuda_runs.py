"""Whole runs on an emulated GPU: nothing mixes tensors of host and device, or races.

tests/device_run.py states what the emulation detects.
"""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from ssl_runner.data import images
from ssl_runner.device import to_device, to_host
from ssl_runner.evaluation import embed_cli, probe_cli, relation_cli
from ssl_runner.host_copy import HostCopy
from ssl_runner.runs.files import read_json
from tests.device import HERE
from tests.device_run import Mismatch, emulated_cuda
from tests.helpers import TINY, make_pictures, preempt_after, run_folder, run_script, table

EVERY_PROBE = (
    "epochs=1 probe.probes=[knn,ridge] probe.layer=0"
    " probe.features=[backbone,projector,random_init,pixels,pca,lda]"
)
LINEAR = (
    "epochs=1 solver=closed_form backbone=linear dataset.size=14 dataset.subset=200 batch_size=50"
    " embedding.method=none diagnostics.num_images=60"
)
SAME_VIEWS = "views=none precision=fp32"  # the views do not depend on random numbers, which differ
SMALL = "probe.features=[backbone] dataset.size=14 dataset.subset=100 batch_size=25 diagnostics.num_images=60"


@pytest.fixture
def cuda_run(ssl_run: Callable) -> Callable[[str], tuple[int, str, str]]:
    """Return a function that runs `ssl-run` in this process on the emulated GPU."""

    def run(command: str) -> tuple[int, str, str]:
        with emulated_cuda():
            return ssl_run(f"{command} device=cuda")

    return run


def check(folder: Path) -> None:
    """Check that a run is done, on the emulated GPU, and that all of its figures are finite."""
    record = read_json(folder / "run.json")
    assert (record["status"], record["device"], record["compile"]) == ("done", "Emulated GPU", "off")
    for name in ("metrics.csv", "probe.csv"):
        numbers = pd.read_csv(folder / name).select_dtypes("number").to_numpy()
        assert len(numbers)
        assert not np.isinf(numbers).any()
    assert math.isfinite(record["loss"])
    assert 0 <= record["top1"] <= 1


@pytest.mark.parametrize(
    "settings",
    [
        "loss=spectral relation=labels precision=bf16 optimizer=lars",
        "loss=barlow center=true views=barlow precision=tf32",
        "variance=squared views=vicreg precision=fp16",
        "loss=sigreg per_view=true V=3 precision=bf16",
        "loss=wmse projector.K=8 precision=fp16",
        "loss=simclr relation=labels relation.normalized=true precision=fp16 optimizer=lars",
        "relation=neighbors relation.queue=100 precision=bf16 optimizer=sgd optimizer.clip_grad_norm=1",
        "relation=noisy relation@relation.base=neighbors deterministic=true",
        "forward=per_view views=crop precision=bf16 optimizer=sgd optimizer.lr=0.01",
        "dataset.storage=host views=simclr views.resolutions=[10,12,14] deterministic=true",
        "dataset.storage=host precision=fp16 views.resolutions=[10,14] optimizer.clip_grad_norm=1",
        "views=multicrop views.policies.small.size=8 precision=bf16 views.preview=true relation=neighbors",
        "loss=simclr dataset.storage=host precision=bf16 V=4 channels_last=false views.preview=true",
        "dataset.eval_resize=16 dataset.eval_crop=12 embedding.method=pca embedding.images=50 probe.every=1"
        " probe.keep=best precision=bf16 probe.labels=[0.1,0.5] probe.draws=2",
    ],
)
def test_run_with_every_option_on_cuda(cuda_run: Callable, settings: str) -> None:
    tiny = TINY
    if "backbone=timm" in settings:
        tiny = tiny.replace("backbone.widths=[8,16]", "")
    code, out, err = cuda_run(f"{tiny} {SMALL} precision=fp32 {settings}")
    assert (code, err) == (0, "")
    check(run_folder(out))


@pytest.mark.parametrize(
    "settings",
    [
        f"{TINY} {SMALL} {EVERY_PROBE}",
        f"{TINY} {SMALL} loss=simclr relation=labels V=3 dataset.storage=host",
        f"{TINY} {SMALL} loss=barlow relation=neighbors forward=per_view",
        f"{TINY} {SMALL} loss=spectral relation=noisy relation.normalized=true optimizer=sgd",
        pytest.param(f"{TINY} {SMALL} loss=mmcr alpha=0.1 V=3", marks=pytest.mark.slow),
        f"{TINY} {SMALL} probe.every=1 probe.keep=best deterministic=true views.resolutions=[10,14]",
        f"{TINY} {SMALL} V=3 +views.policies.all.count=1 +views.policies.small={{count:2,size:8}}",
        f"{LINEAR} backbone.width=8 probe.features=[backbone]",
        pytest.param(
            f"{LINEAR} loss=spectral relation=labels probe.features=[backbone] probe.probes=[ridge,knn]",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"{LINEAR} loss=barlow backbone.width=16 probe.features=[backbone] probe.probes=[ridge,knn]",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cuda_run_gives_figures_of_cpu(ssl_run: Callable, cuda_run: Callable, settings: str) -> None:
    """Without random views, and in fp32, both devices compute the same to rounding."""
    folders = []
    for run, settings_ in ((ssl_run, f"{settings} device=cpu"), (cuda_run, settings)):
        code, out, err = run(f"{settings_} {SAME_VIEWS}")
        assert (code, err) == (0, "")
        folders.append(run_folder(out))
    check(folders[1])
    for name in ("metrics.csv", "probe.csv"):
        rows, expected = (table(folder / name) for folder in reversed(folders))
        assert len(rows) == len(expected)
        for row, of_cpu in zip(rows, expected, strict=True):
            assert row.keys() == of_cpu.keys()
            for column, value in of_cpu.items():
                close(row[column], value, column)


def close(value: str, expected: str, column: str) -> None:
    """Compare two fields. An accuracy may differ by a few images of 1,000 or 20, where rounding decides."""
    if column == "selection" or not expected:
        return
    try:
        number = float(expected)
    except ValueError:
        assert value == expected
        return
    tolerance = {"abs": 0.051} if column in ("top1", "top5") else {"rel": 2e-3, "abs": 1e-4}
    assert float(value) == pytest.approx(number, **tolerance), column


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        "backbone=timm backbone.name=test_resnet dataset.size=28 dataset.subset=200 batch_size=50",
        "backbone=timm backbone.name=test_vit +backbone.patch_size=14 precision=fp16 forward=per_view",
    ],
)
def test_run_of_large_backbone_on_cuda(cuda_run: Callable, settings: str) -> None:
    tiny = TINY.replace("backbone.widths=[8,16]", "")
    code, out, err = cuda_run(f"{tiny} {SMALL} precision=fp32 epochs=1 {settings}")
    assert (code, err) == (0, "")
    check(run_folder(out))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_preempted_cuda_run_resumes_exactly(
    cuda_run: Callable, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{TINY} {SMALL} relation=neighbors relation.queue=30 views=crop precision={precision}"
    code, out, _ = cuda_run(command)
    assert code == 0
    whole = run_folder(out)
    with monkeypatch.context() as patch:
        preempt_after(5, patch)  # in the second epoch
        code, _, err = cuda_run(f"{command} hydra.run.dir=preempted")
    assert code == 75, err
    code, out, err = cuda_run("resume=preempted")
    assert (code, err) == (0, "")
    for name in ("metrics.csv", "probe.csv"):
        assert table(tmp_path / "preempted" / name) == table(whole / name)


def test_finished_cuda_run_is_probed_and_embedded(
    cuda_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ssl-probe with label shares and fine-tuning; ssl-embed of the data set and of a folder as on a CPU."""
    code, out, err = cuda_run(f"{TINY} {SMALL} epochs=1 dataset.storage=host")
    assert (code, err) == (0, "")
    run = run_folder(out)
    make_pictures(tmp_path / "pictures", 2, 2, side=20)

    def call(main: Any, command: str) -> None:
        code, _, err = run_script(main, shlex.split(command), monkeypatch, capsys)
        assert (code, err) == (0, "")

    with emulated_cuda():
        for probe in ("probe.labels=[0.5] probe.draws=1", "probe=finetune probe.finetune.epochs=1"):
            call(probe_cli.main, f"'{run}' {probe} device=cuda")
        call(embed_cli.main, f"'{run}' --device cuda --projections -o data.npz")
        call(embed_cli.main, f"'{run}' pictures --device cuda -o folder.csv")
    call(embed_cli.main, f"'{run}' --device cpu --projections -o data-cpu.npz")
    call(embed_cli.main, f"'{run}' pictures --device cpu -o folder-cpu.csv")
    written, expected = (np.load(tmp_path / f"{name}.npz") for name in ("data", "data-cpu"))
    assert [*written] == [*expected]
    for name in ("features", "projections"):
        np.testing.assert_allclose(written[name], expected[name], rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(*map(pd.read_csv, ("folder.csv", "folder-cpu.csv")), rtol=1e-4, atol=1e-5)


def test_label_fit_of_views_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = "dataset.size=14 dataset.subset=100 dataset.storage=host backbone.widths=[8,16]"
    with emulated_cuda():
        command = f"{data} views=crop device=cuda --passes 1"
        code, _, err = run_script(relation_cli.main, shlex.split(command), monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert pd.read_csv("relation/relation.csv").notna().all(axis=None)


# --- the emulation detects what fails or races on CUDA ------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda X: X + torch.ones(4, 4),
        lambda X: torch.ones(4, 4) @ X,
        lambda X: torch.cat([X, torch.ones(1, 4)]),
        lambda X: torch.ones(4, 4)[X.argmax(1)],
        lambda X: X.index_select(0, torch.arange(2)),
        lambda X: X.gather(1, torch.zeros(4, 1, dtype=torch.long)),
        lambda X: X.index_put_((X.argmax(1),), torch.ones(4, 4)),
        lambda X: torch.where(X > 0, X, torch.zeros(4, 4)),
        lambda X: X.numpy(),
        lambda X: np.asarray(X),
        lambda X: X.long() @ X.long(),
        lambda X: torch.rand(3, generator=torch.Generator(HERE)),
        lambda X: torch.rand(3, generator=torch.Generator(), device=HERE),
        lambda X: X.uniform_(generator=torch.Generator()),
        lambda X: X.to("cpu", non_blocking=True),
    ],
)
def test_mixture_of_host_and_device_is_detected(wrong: Callable[[Tensor], Any]) -> None:
    with emulated_cuda(), pytest.raises(Mismatch):
        wrong(to_device(torch.randn(4, 4), HERE))


@pytest.mark.parametrize(
    "right",
    [
        lambda X: X * torch.tensor(2.0),
        lambda X: X[torch.arange(2)],
        lambda X: X.cpu().numpy(),
        lambda X: X.tolist(),
        lambda X: f"{X.sum():.3f} {bool(X.any())} {X.nonzero()}",
        lambda X: X.uniform_(generator=torch.Generator(HERE)),
        lambda X: torch.rand(3, generator=torch.Generator(), device="cpu"),
        lambda X: X.new_zeros(3) + torch.zeros(3, device=X.device),
        lambda X: torch.linalg.eigh(X @ X.T),
    ],
)
def test_waiting_for_the_device_is_accepted(right: Callable[[Tensor], Any]) -> None:
    with emulated_cuda():
        right(to_device(torch.randn(4, 4), HERE))


def test_copy_to_host_arrives_after_its_event() -> None:
    with emulated_cuda():
        X = to_device(torch.ones(3), HERE)
        host, event = to_host(X)
        X.zero_()  # later in stream order
        assert event is not None
        assert host.isnan().all()
        event.synchronize()
        assert host.tolist() == [1, 1, 1]
        copy, wait = HostCopy()({"weights": X})
        assert copy["weights"].isnan().all()
        wait()
        assert copy["weights"].tolist() == [0, 0, 0]


def test_pinned_memory_written_too_early_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda():
        buffer = torch.ones(3).pin_memory()
        X = buffer.to(HERE, non_blocking=True)
        buffer.zero_()
        with pytest.raises(Mismatch, match="pinned memory"):
            X.tolist()


def test_prefetcher_without_waits_is_detected(cuda_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compute stream waits for the copy of a batch, and the buffer is filled after its last copy."""
    command = f"{TINY} {SMALL} epochs=1 dataset.storage=host"
    with monkeypatch.context() as patch:
        patch.setattr(images.Prefetcher, "ready", lambda self, batch: batch)
        code, _, err = cuda_run(command)
        assert code == 1
        assert "has not waited" in err
    gather = images.PinnedBuffer.gather

    def careless(self: Any, *args: Any) -> Tensor:
        self.copied = None
        return gather(self, *args)

    monkeypatch.setattr(images.PinnedBuffer, "gather", careless)
    code, _, err = cuda_run(command)
    assert code == 1
    assert "pinned memory" in err


def test_operation_without_deterministic_form_is_detected() -> None:
    with emulated_cuda():
        x = to_device(torch.randn(1, 1, 4, 4), HERE).requires_grad_()
        y = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect").sum()
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(Mismatch, match="deterministic"):
                y.backward()
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_types_are_those_of_cuda(dtype: torch.dtype) -> None:
    with emulated_cuda():
        x = to_device(torch.randn(2, 3, 4, 4), HERE)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(HERE)
        with torch.autocast("cuda", dtype):
            y = network(x)
            z = y.flatten(1) @ y.flatten(1).T
            assert (y.dtype, z.dtype, z.softmax(1).dtype) == (dtype, dtype, torch.float32)
            norm = torch.nn.functional.layer_norm(z, (2,))
            assert norm.dtype == torch.float32
        norm.square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
