"""Choice of device and precision, and reuse of freed CPU memory, measured by page faults."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from ssl_runner.device import (
    choose_device,
    choose_precision,
    to_device,
    to_host,
)
from ssl_runner.errors import UsageError


def test_choose_device_returns_device_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_choose_device_without_cuda_raises(device: str) -> None:
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(UsageError, match=f"device={device}: this machine has no CUDA device"):
        choose_device(device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has an MPS device")
def test_choose_device_without_mps_raises() -> None:
    with pytest.raises(UsageError, match="no MPS device"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32")],
)
def test_auto_precision_on_cpu_depends_on_bf16_instructions(
    capabilities: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"


def test_mps_has_no_fp16() -> None:
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(UsageError, match="precision=fp16: mps does not support it"):
        choose_precision("fp16", torch.device("mps"))


class Tensorlike:
    """Records the arguments of copies."""

    def __init__(self, device: str):
        self.device, self.calls = torch.device(device), []

    def to(self, *args: object, **kwargs: object) -> "Tensorlike":
        self.calls.append(("to", args, kwargs))
        return self

    def pin_memory(self) -> "Tensorlike":
        self.calls.append(("pin_memory", (), {}))
        return self


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_copies_are_blocking_and_unpinned_unless_on_cuda(device: str) -> None:
    """Non-blocking copies of pageable memory give wrong values on MPS."""
    tensor: Any = Tensorlike("cpu")
    assert to_device(tensor, torch.device(device)) is tensor
    assert tensor.calls == [("to", (torch.device(device),), {})]
    tensor = Tensorlike(device)
    assert to_host(tensor) == (tensor, None)
    assert tensor.calls == []


def test_copies_to_cuda_are_non_blocking_and_pinned() -> None:
    tensor: Any = Tensorlike("cpu")
    to_device(tensor, torch.device("cuda"))
    assert tensor.calls == [
        ("pin_memory", (), {}),
        ("to", (torch.device("cuda"),), {"non_blocking": True}),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_to_and_from_cuda_keep_values() -> None:
    values = torch.randn(1000)
    host, event = to_host(to_device(values, torch.device("cuda", 0)))
    assert event is not None
    event.synchronize()
    assert host.is_pinned()
    assert torch.equal(host, values)


def test_auto_precision_on_cuda_is_bf16_if_supported_else_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", cuda) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert choose_precision("auto", cuda) == "fp16"
    with pytest.raises(UsageError, match="precision=bf16: cuda does not support it"):
        choose_precision("bf16", cuda)


FAULTS = """
import resource, sys
import torch
from ssl_runner.device import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
def step():
    torch.ones(24, 2**20)  # 96 MiB
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif("sys.platform != 'linux' or __import__('platform').libc_ver()[0] != 'glibc'")
def test_keep_freed_memory_avoids_page_faults() -> None:
    """Four steps cause few page faults with keep_freed_memory, but many by default."""
    kept, default = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], text=True))
        for mode in ("kept", "default")
    )
    assert kept < 100
    assert default > 4 * 24  # pages may be 2 MiB large
