"""The devices of all ranks: refuse, in one line, what NCCL would refuse in a page."""

import platform
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ssl_runner.distributed.group import world_size
from ssl_runner.distributed.objects import all_gather_object
from ssl_runner.errors import UsageError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one per machine, also within containers


def check_devices(device: torch.device) -> None:
    """Raise UsageError if the ranks have devices of several kinds, or if ranks share a GPU.

    `device` is that of this rank. All ranks must call this function, before the first NCCL collective, and
    all of them raise. The comparison uses gloo. Does nothing if W = 1.
    """
    if world_size() == 1:
        return
    described = describe(device)
    ranks = all_gather_object(described)
    if len({kind for kind, _, _ in ranks}) > 1:
        found = ", ".join(f"rank {rank} on {host}: {kind}" for rank, (kind, host, _) in enumerate(ranks))
        raise UsageError(
            f"device=auto: expected one kind of device on all ranks, found {found};"
            " use device=cpu, or start processes only where there is a GPU"
        )
    users: dict[Any, list[int]] = defaultdict(list)
    for rank, (_, _, identity) in enumerate(ranks):
        users[identity].append(rank)
    shared = [
        f"ranks {', '.join(map(str, those))} share one GPU of {ranks[those[0]][1]}"
        for identity, those in users.items()
        if identity is not None and len(those) > 1
    ]
    if shared:
        raise UsageError(
            f"device=cuda: expected one GPU for each process, but {'; '.join(shared)};"
            " start at most one process per GPU, or use device=cpu"
        )


def describe(device: torch.device) -> tuple[str, str, Any]:
    """Return kind, host name and identity of a device. The identity is None if ranks may share the device.

    Like NCCL, it identifies a GPU by machine and PCI address, also where CUDA_VISIBLE_DEVICES renumbers GPUs
    or MIG splits one. PyTorch before 2.8 has no PCI address; the UUID replaces it.
    """
    host = platform.node()
    if device.type != "cuda":
        return device.type, host, None
    properties = torch.cuda.get_device_properties(device)
    address = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in address:
        return device.type, host, str(properties.uuid)
    machine = host
    with suppress(OSError):
        machine = BOOT_ID.read_text().strip()
    return device.type, host, (machine, *address)
