"""A device that is not there: CPU tensors that play a GPU's memory, so that a test sees what would make the host wait for it.

Within `pretended()` a tensor on cuda:0 is an `OnDevice`, whose values lie on the CPU and whose device says cuda:0. What reads
them raises `Waits`, as does what copies between host and device other than through pinned memory without waiting, what makes a
tensor whose size depends on values, and what mixes the tensors of both. The host's own tensors stay as they are.
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
    aten._local_scalar_dense: ".item(), .tolist(), bool() or a number made of a tensor",
    aten.is_nonzero: "bool() of a tensor",
    aten.equal: "torch.equal",
    aten.allclose: "torch.allclose",
    aten.nonzero: "nonzero, whose result's size depends on values",
    aten.masked_select: "masked_select, whose result's size depends on values",
    aten._unique: "unique, whose result's size depends on values",
    aten._unique2: "unique, whose result's size depends on values",
    aten.unique_dim: "unique, whose result's size depends on values",
    aten.unique_consecutive: "unique, whose result's size depends on values",
    aten.bincount: "bincount, whose result's size depends on values",
    aten._coalesce: "coalescing a sparse tensor",
    aten._linalg_eigh: "an eigendecomposition",
    aten._linalg_svd: "a singular value decomposition",
    aten.linalg_cholesky_ex: "a factorisation",
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


class Waits(AssertionError):
    """The host would wait for the device here."""


class OnDevice(Tensor):
    """A tensor of the device that is not there. C++ takes it for one on `meta`, which lets autograd run where there is no GPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        options: Any = {"dtype": values.dtype, "layout": values.layout, "device": "meta"}
        if values.layout == torch.strided:
            options |= {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made: Any = Tensor._make_wrapper_subclass(cls, values.shape, **options)
        made.values = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return HERE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, *, force: bool = False) -> Any:
        raise Waits("numpy() of a tensor on the device")

    def tolist(self) -> Any:
        raise Waits("tolist() of a tensor on the device")

    def __format__(self, spec: str) -> str:
        raise Waits("a tensor on the device in a text")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of the device, outside of pretended()")


class _Device(TorchDispatchMode):
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
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        pinned = kwargs.pop("pin_memory", False)
        if ours or there:
            if packet in (aten._to_copy, aten.copy_):
                self.copies(func, args, kwargs, there)
            else:
                self.computes(func, args, kwargs, ours, host)
        args, kwargs = tree_map(lambda x: x.values if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if pinned:
            result.is_pinned_here = True
        if not there or (packet is aten.copy_ and id(args[0]) not in ours):
            return result
        return tree_map(
            lambda x: ours[id(x)] if id(x) in ours else OnDevice(x) if isinstance(x, Tensor) else x, result
        )

    @staticmethod
    def copies(func: Any, args: Any, kwargs: Any, there: bool) -> None:
        """_to_copy(from, non_blocking=...) and copy_(to, from, non_blocking)."""
        if func.overloadpacket is aten._to_copy:
            source, blocking = args[0], not kwargs.get("non_blocking", False)
            to_device, pinned = there, getattr(source, "is_pinned_here", False)
        else:
            to, source = args[:2]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            to_device = isinstance(to, OnDevice)
            pinned = getattr(to if isinstance(source, OnDevice) else source, "is_pinned_here", False)
        if isinstance(source, OnDevice) == to_device or not source.numel():
            return  # from the device to itself, or nothing
        if to_device and (blocking or not pinned):
            raise Waits(
                "a copy to the device that waits: pin the memory and give non_blocking=True, as `copied` does"
            )
        if not to_device and func.overloadpacket is aten._to_copy:
            raise Waits("a copy from the device to the host")
        if not to_device and (blocking or not pinned):
            raise Waits("a copy from the device to the host that waits")

    @staticmethod
    def computes(func: Any, args: Any, kwargs: Any, ours: dict[int, "OnDevice"], host: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in READ:
            raise Waits(f"{READ[packet]}, on the device")
        if (
            packet is aten.repeat_interleave
            and func._overloadname == "Tensor"
            and kwargs.get("output_size") is None
        ):
            raise Waits("repeat_interleave by a tensor, without output_size")
        if packet in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise Waits("indexing by a mask, whose number of entries depends on values")
        if any(t.is_meta for t in host):  # a new_tensor, which C++ makes by itself
            raise Waits("a tensor made of numbers on the device")
        if ours and any(t.ndim or packet in INDEXED or packet is aten.where for t in host):
            raise Waits(f"{func} mixes tensors of the device with others of the host")


class _Event:
    """One that has not happened yet, and for which nobody may wait."""

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise Waits("waiting for an event")


@contextmanager
def pretended() -> Iterator[None]:
    """A context in which cuda:0 is there, and waiting for it raises `Waits`. Random numbers come from a CPU's generator."""

    def waits(*args: Any, **kwargs: Any) -> None:
        raise Waits("waiting for the device")

    stand_ins = {
        "Event": _Event,
        "current_stream": lambda device=None: None,
        "synchronize": waits,
        "_lazy_init": lambda: None,
    }
    of_the_host = torch.Generator

    def generator(device: Any = None) -> torch.Generator:
        return of_the_host()

    amp = mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False)
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(torch, "Generator", generator),
        amp,
        _Device(),
    ):
        yield


def moved(module: nn.Module) -> nn.Module:
    """The module, with its parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                with _Device():
                    part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
