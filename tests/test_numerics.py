"""Switches of torch's arithmetic: set in every run, restored after it, recorded in run.json."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_runner import numerics
from ssl_runner.device import choose_precision
from ssl_runner.errors import UsageError
from ssl_runner.loss import VICReg
from ssl_runner.relation import Relation
from ssl_runner.train import Pretraining
from tests.helpers import CPU, TINY, pretraining, rows, toy
from tests.test_no_host_sync import RELATIONS

CUDA = torch.device("cuda")


def switches() -> dict[str, bool]:
    """The state of torch in this process."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
    }


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(numerics.CUBLAS, ":4096:8")
    with numerics.preserved():
        yield


FORMS: dict[str, tuple[torch.device, str, bool, dict[str, bool]]] = {
    "cpu": (CPU, "fp32", False, {}),
    "deterministic cpu": (CPU, "fp32", True, {"algorithms": True, "cudnn": True}),
    "fp32": (CUDA, "fp32", False, {"benchmark": True}),
    "bf16": (CUDA, "bf16", False, {"benchmark": True}),
    "tf32": (CUDA, "tf32", False, {"benchmark": True, "convolutions": True, "products": True}),
    "deterministic": (CUDA, "auto", True, {"algorithms": True, "cudnn": True}),
}


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_apply_sets_every_switch_whatever_was_set_before(form: str, after: str) -> None:
    numerics.apply(*FORMS[after][:3])
    *arguments, on = FORMS[form]
    recorded = numerics.apply(*arguments)
    assert switches() == dict.fromkeys(switches(), False) | on
    assert recorded == {
        "deterministic": on.get("cudnn", False),
        "tf32": on.get("products", False),
        "cudnn_benchmark": on.get("benchmark", False),
    }


@pytest.mark.parametrize("form", FORMS)
def test_preserved_restores_every_switch(form: str) -> None:
    numerics.apply(*FORMS[form][:3])
    before = switches()
    for other in FORMS:
        with pytest.raises(KeyError), numerics.preserved():  # noqa: PT012
            numerics.apply(*FORMS[other][:3])
            raise KeyError
        assert switches() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch < 2.9 has no fp32_precision")
def test_apply_resolves_conflict_with_fp32_precision() -> None:
    """Setting `fp32_precision` alone makes the older switches unreadable."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        switches()
    with numerics.preserved():
        numerics.apply(CUDA, "fp32", False)
        assert not switches()["convolutions"]
        assert not switches()["products"]
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        numerics.apply(CUDA, "tf32", False)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_cublas_workspace_is_set_in_every_run_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch reads it once per process, so a run without `deterministic` must set it for a later one."""
    monkeypatch.delenv(numerics.CUBLAS)
    numerics.apply(CPU, "fp32", True)
    assert numerics.CUBLAS not in os.environ
    numerics.apply(CUDA, "fp32", False)
    assert os.environ[numerics.CUBLAS] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    numerics.apply(CUDA, "fp32", True)


@pytest.mark.parametrize(
    ("given", "message"), [(None, "set it and start a new process"), (":0:0", "found :0:0; unset it")]
)
def test_deterministic_without_deterministic_cublas_raises(
    given: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(numerics.CUBLAS) if given is None else monkeypatch.setenv(numerics.CUBLAS, given)
    with pytest.raises(UsageError, match=f"deterministic=true: expected {numerics.CUBLAS}.*{message}"):
        numerics.apply(CUDA, "fp32", True)
    numerics.apply(CUDA, "fp32", False)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_tf32_requires_compute_capability_8(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability >= (8, 0):
        assert choose_precision("tf32", CUDA) == "tf32"
    else:
        with pytest.raises(
            UsageError, match=r"precision=tf32: expected .* capability 8\.0 or newer, found cuda"
        ):
            choose_precision("tf32", CUDA)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_tf32_without_cuda_raises(device: str) -> None:
    with pytest.raises(UsageError, match=f"precision=tf32: .*found {device}; use precision=auto"):
        choose_precision("tf32", torch.device(device))


def test_tf32_training_computes_loss_in_fp32_and_network_in_tf32() -> None:
    seen = set()

    class Recorded(VICReg):
        def _terms(self, Z: Tensor, G: Relation) -> dict[str, Tensor]:
            seen.add(("loss", torch.backends.cuda.matmul.allow_tf32))
            return super()._terms(Z, G)

    training = pretraining(Recorded(), epochs=1, precision="tf32")
    training.model.backbone.register_forward_hook(
        lambda *args: seen.add(("network", torch.backends.cuda.matmul.allow_tf32))
    )
    numerics.apply(CPU, "tf32", False)
    next(training.epochs())
    assert seen == {("network", True), ("loss", False)}
    assert torch.backends.cuda.matmul.allow_tf32


def test_run_sets_switches_and_restores_them(
    ssl_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = Pretraining._step, []

    def recorded(self: Pretraining, *args: Any) -> Any:
        seen.append(switches())
        return step(self, *args)

    monkeypatch.setattr(Pretraining, "_step", recorded)
    before = switches()
    values = []
    for name, extra in (("a", "deterministic=true"), ("b", "deterministic=true"), ("c", "")):
        code, out, err = ssl_run(f"{TINY} {extra} hydra.run.dir={tmp_path / name}")
        assert (code, err) == (0, ""), out + err
        assert switches() == before
        record = json.loads((tmp_path / name / "run.json").read_text())
        on = extra != ""
        assert record["numerics"] == {"deterministic": on, "tf32": False, "cudnn_benchmark": False}
        assert {s["algorithms"] for s in seen} == {s["cudnn"] for s in seen} == {on}
        assert not seen[0]["convolutions"]
        seen.clear()
        values.append(record["loss"])
    assert values[0] == values[1]


def test_run_refuses_tf32_on_cpu(ssl_run: Callable) -> None:
    code, _, err = ssl_run(TINY.replace("precision=fp32", "precision=tf32"))
    assert code == 1
    assert err.startswith("precision=tf32: expected a CUDA device")
    assert err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("of", RELATIONS)
def test_deterministic_training_on_cuda_is_repeatable(of: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("i,j\n" + "\n".join(f"{i},{i + 4}" for i in range(80)))
    device, runs = torch.device("cuda", 0), []
    numerics.apply(device, "fp32", deterministic=True)
    for _ in range(2):
        relation = RELATIONS[of](str(tmp_path / "pairs.csv"))
        relation.bind(toy().labels)
        runs.append(rows(pretraining(relation=relation, device=device)))
    assert runs[0] == runs[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp32_product_on_cuda_is_accurate_and_tf32_is_not() -> None:
    A = torch.randn(512, 512, dtype=torch.float64, device="cuda")
    exact, errors = A @ A, {}
    for precision in ("fp32", "tf32"):
        numerics.apply(CUDA, precision, False)
        product = A.float() @ A.float()
        errors[precision] = ((product - exact).norm() / exact.norm()).item()
    assert errors["fp32"] < 1e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < errors["tf32"] < 1e-3
