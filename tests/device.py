"""An emulated GPU that detects host-device syncs, for tests on machines without one.

Within `pretended()` a tensor on cuda:0 is an `OnDevice`: its values are in CPU memory, and its `device` is
cuda:0. Operations that would cause a host-device sync on CUDA raise `Waits`: reading values, copies between
host and device that are blocking or use unpinned memory, and operations whose output size depends on values.
Operations that mix tensors of host and device also raise it. Ordinary CPU tensors are not affected.

tests/device_run.py runs whole commands on this device, where waiting is allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

HERE = torch.device("cuda:0")
aten = torch.ops.aten

READ = {
    aten._local_scalar_dense: ".item(), .tolist(), bool() or conversion of a tensor to a number",
    aten.is_nonzero: "bool() of a tensor",
    aten.equal: "torch.equal",
    aten.allclose: "torch.allclose",
    aten.nonzero: "nonzero, whose output size depends on values",
    aten.masked_select: "masked_select, whose output size depends on values",
    aten._unique: "unique, whose output size depends on values",
    aten._unique2: "unique, whose output size depends on values",
    aten.unique_dim: "unique, whose output size depends on values",
    aten.unique_consecutive: "unique, whose output size depends on values",
    aten.bincount: "bincount, whose output size depends on values",
    aten._coalesce: "coalescing a sparse tensor",
    aten._linalg_eigh: "an eigendecomposition",
    aten._linalg_svd: "a singular value decomposition",
    aten._linalg_check_errors: "the check of a factorisation",
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


_pinned: dict[int, torch.UntypedStorage] = {}  # by address; the storages stay alive, so addresses are unique


def pin(tensor: Tensor) -> Tensor:
    """Mark the memory of a host tensor as pinned, until the emulation ends. Returns the tensor."""
    _pinned[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a tensor lies in memory that was marked as pinned."""
    return not isinstance(tensor, OnDevice) and tensor.untyped_storage().data_ptr() in _pinned


class Waits(AssertionError):
    """An operation would cause a host-device sync."""


class OnDevice(Tensor):
    """A tensor on the emulated device.

    In C++ its device is `meta`, so that autograd works on machines without a GPU.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        options: Any = {"dtype": values.dtype, "layout": values.layout, "device": "meta"}
        if values.layout == torch.strided:
            options |= {"strides": values.stride(), "storage_offset": values.storage_offset()}
        tensor: Any = Tensor._make_wrapper_subclass(cls, values.shape, **options)
        tensor.values = values
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return HERE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, *, force: bool = False) -> Any:
        raise Waits("numpy() of a tensor on the device")

    def tolist(self) -> Any:
        raise Waits("tolist() of a tensor on the device")

    def __format__(self, spec: str) -> str:
        raise Waits("formatting of a tensor on the device")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on an OnDevice tensor outside pretended()")


class EmulatedDevice(TorchDispatchMode):
    """Executes the operations on `OnDevice` tensors. `copies` and `computes` refuse what syncs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        ours = {id(t.values): t for t in tensors if isinstance(t, OnDevice)}
        host = [t for t in tensors if not isinstance(t, OnDevice)]
        device = kwargs.get("device")
        there = bool(ours) if device is None else torch.device(device).type in ("cuda", "meta")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if packet is aten._pin_memory:
            return pin(args[0].clone())
        pinned = kwargs.pop("pin_memory", False)
        if ours or there:
            if packet in (aten._to_copy, aten.copy_):
                self.copies(func, args, kwargs, there)
            else:
                self.computes(func, args, kwargs, ours, host)
        args, kwargs = tree_map(lambda x: x.values if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if pinned:
            pin(result)
        if not there or (packet is aten.copy_ and id(args[0]) not in ours):
            return result
        return tree_map(
            lambda x: ours[id(x)] if id(x) in ours else OnDevice(x) if isinstance(x, Tensor) else x, result
        )

    @staticmethod
    def copies(func: Any, args: Any, kwargs: Any, there: bool) -> None:
        """Raise `Waits` if _to_copy(source, non_blocking=) or copy_(to, source, non_blocking) would sync."""
        if func.overloadpacket is aten._to_copy:
            source, blocking = args[0], not kwargs.get("non_blocking", False)
            to_device, pinned = there, is_pinned(source)
        else:
            to, source = args[:2]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            to_device = isinstance(to, OnDevice)
            pinned = is_pinned(to if isinstance(source, OnDevice) else source)
        if isinstance(source, OnDevice) == to_device or not source.numel():
            return  # within one device, or empty
        if to_device and (blocking or not pinned):
            raise Waits(
                "a blocking copy to the device: use pinned memory and non_blocking=True, as `to_device` does"
            )
        if not to_device and func.overloadpacket is aten._to_copy:
            raise Waits("a copy from the device to the host")
        if not to_device and (blocking or not pinned):
            raise Waits("a blocking copy from the device to the host")

    @staticmethod
    def computes(func: Any, args: Any, kwargs: Any, ours: dict[int, "OnDevice"], host: list[Tensor]) -> None:
        """Raise `Waits` if the operation would cause a sync, or if it mixes tensors of host and device."""
        packet = func.overloadpacket
        if packet in READ:
            raise Waits(f"{READ[packet]}, on the device")
        if (
            packet is aten.repeat_interleave
            and func._overloadname == "Tensor"
            and kwargs.get("output_size") is None
        ):
            raise Waits("repeat_interleave with tensor repeats and without output_size")
        if packet in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise Waits("indexing by a mask, whose output size depends on values")
        if any(t.is_meta for t in host):  # from new_tensor, which C++ creates directly
            raise Waits("creation of a tensor on the device from Python numbers")
        if ours and any(t.ndim or packet in INDEXED or packet is aten.where for t in host):
            raise Waits(f"{func} mixes tensors of host and device")


class _Event:
    """An event that has not completed yet. Waiting for it raises `Waits`."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise Waits("Event.synchronize()")


@contextmanager
def pretended() -> Iterator[None]:
    """Emulate cuda:0 in this context: a host-device sync raises `Waits`. Generators are CPU generators."""

    def waits(*args: Any, **kwargs: Any) -> None:
        raise Waits("torch.cuda.synchronize()")

    stand_ins = {
        "Event": _Event,
        "current_stream": lambda device=None: None,
        "synchronize": waits,
        "_lazy_init": lambda: None,
    }
    cpu_generator = torch.Generator

    def generator(device: Any = None) -> torch.Generator:
        return cpu_generator()

    amp = mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False)
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(torch, "Generator", generator),
        amp,
        EmulatedDevice(),
    ):
        try:
            yield
        finally:
            _pinned.clear()


def moved(module: nn.Module) -> nn.Module:
    """Move parameters and buffers of the module to the emulated device, in place. Returns the module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                with EmulatedDevice():
                    part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
