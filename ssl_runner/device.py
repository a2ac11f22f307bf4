"""Device, precision and memory: what the machine offers and how tensors reach it."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor

from ssl_runner.distributed import RankInfo
from ssl_runner.errors import UsageError, counted

AUTOCAST_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h


def choose_device(device: str, ranks: RankInfo | None = None) -> torch.device:
    """Return the device of a run: `auto` is cuda, else mps, else cpu. Ranks on one machine use separate GPUs.

    Raises UsageError if the machine lacks the device, or if several ranks are given one device by name.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available() and not ranks
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, index = device.partition(":")
    if ranks and (index or kind == "mps"):
        raise UsageError(
            f"device={device}: one device for {ranks.world_size} processes; use auto, cuda or cpu"
        )
    if ranks and kind == "cuda" and torch.cuda.device_count() > 1:
        # if only one GPU is visible, Slurm has assigned it to this rank
        index = str(ranks.local_rank)
    if kind == "cuda":
        count = torch.cuda.device_count()
        if ranks and 0 < count <= int(index or 0):
            raise UsageError(
                f"device=cuda: expected at most {counted(count, 'process', 'processes')} on this machine, one"
                f" per GPU, but rank {ranks.rank} is its process {ranks.local_rank + 1}; start fewer"
                " processes, or use device=cpu"
            )
        if int(index or 0) >= count:
            found = f"{counted(count, 'CUDA device')}, numbered from 0" if count else "no CUDA device"
            raise UsageError(f"device={device}: this machine has {found}; use device=auto")
        return torch.device("cuda", int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device={device}: this machine has no MPS device; use device=auto")
    return torch.device(kind)


def choose_precision(precision: str, device: torch.device) -> str:
    """Return the precision of autocast: `auto` is bf16 if the hardware has it, else fp16 on CUDA, else fp32.

    A CPU without such instructions emulates bf16 an order of magnitude slower than it computes in fp32.
    Raises UsageError if the device does not support the precision.
    """
    if precision == "tf32" and not has_tf32(device):
        raise UsageError(
            f"precision=tf32: expected a CUDA device of compute capability 8.0 or newer, found {device}; use"
            " precision=auto"
        )
    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        native = cpu_has_bf16() if device.type == "cpu" else cuda_bf16
        return "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    bf16 = device.type == "cpu" or cuda_bf16
    if (precision == "bf16" and not bf16) or (precision == "fp16" and device.type == "mps"):
        raise UsageError(f"precision={precision}: {device} does not support it; use precision=auto")
    return precision


def has_tf32(device: torch.device) -> bool:
    """Return whether the device has TF32 units: NVIDIA GPUs since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bf16() -> bool:
    """Return True if this CPU has bf16 instructions (AVX-512 BF16 or AMX), and False with torch < 2.11."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without a host-device sync."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # non-blocking copies of pageable memory are unsafe on MPS


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy a tensor to the host without a host-device sync on CUDA.

    Returns the copy and an event that completes when the copy has arrived. Without CUDA the event is None,
    and the tensor is returned as it is.
    """
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


@contextmanager
def syncs_raise() -> Iterator[None]:
    """Within this context a host-device sync on CUDA raises RuntimeError.

    The mode does not cover torch.sparse and torch.distributed. The syncs of these are visible in a profile.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with catch_warnings():
        # torch calls the mode a prototype, once, where it is set first
        filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on a device is done. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory(device: torch.device) -> None:
    """Keep freed memory in this process for the next allocation, if the device is a CPU.

    By default glibc returns blocks above 32 MiB to the system, and the activations of every step are paged in
    again. Does nothing without glibc.
    """
    if device.type == "cpu" and (mallopt := _glibc("mallopt")):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Return freed memory to the system, once. Does nothing without glibc."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
