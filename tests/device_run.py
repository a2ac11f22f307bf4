"""Whole runs on the emulated GPU of tests/device.py, with emulated streams, events and autocast.

Within `emulated_cuda()` waiting for the device is allowed. What fails or races on CUDA raises `Mismatch`:

- operations that mix tensors of host and device, or a generator of one with a tensor of the other
- integer matrix products, and operations without a deterministic form under `deterministic=true`
- use of a tensor on a stream that has not waited for the stream that computed it
- pinned memory that is written before its copy to the device is complete. An asynchronous copy to the host
  arrives when the host has waited for it; until then the host's memory holds NaN, or zeros.

Kernels, cuBLAS, cuDNN, the caching allocator and CUDA graphs are not emulated. TF32 computes in float32, and
generators of the device give the numbers of a CPU's.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ssl_runner.data.images import prefetcher_of
from tests import device
from tests.device import HERE, INDEXED, READ, EmulatedDevice, OnDevice, aten, is_pinned
from tests.device_streams import (
    Event,
    Mismatch,
    Stream,
    Transfer,
    current_stream,
    default_stream,
    finished,
    of_thread,
    stream,
)

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.addmm_}
# autocast computes these in its type, and everything in FLOAT32 in float32
LOWER = PRODUCTS | {aten.convolution, aten._scaled_dot_product_flash_attention_for_cpu}
LOWER |= {aten.convolution_backward, aten._scaled_dot_product_flash_attention_for_cpu_backward}
FLOAT32 = {
    *(aten._softmax, aten._log_softmax, aten.native_layer_norm, aten.native_group_norm),
    *(aten.exp, aten.log, aten.pow, aten.rsqrt, aten.reciprocal, aten.sum, aten.cumsum),
    *(aten.linalg_vector_norm, aten.logsumexp, aten.softplus, aten.native_layer_norm_backward),
    aten.native_group_norm_backward,
}
NOT_DETERMINISTIC = {
    *(aten._adaptive_avg_pool2d_backward, aten.adaptive_max_pool2d_backward, aten.avg_pool3d_backward),
    *(aten.upsample_bilinear2d_backward, aten.upsample_bicubic2d_backward, aten.grid_sampler_2d_backward),
    *(aten._upsample_bilinear2d_aa_backward, aten.reflection_pad2d_backward, aten.replication_pad2d_backward),
    *(aten.kthvalue, aten.histc, aten.put_, aten.put, aten.max_pool3d_with_indices_backward, aten._ctc_loss),
}
# a host scalar is not accepted as an operand
NO_SCALARS = PRODUCTS | {aten.cat, aten.stack, aten.index_select, aten.index_copy, aten.index_copy_}
NO_SCALARS |= {aten.index_add, aten.index_add_, aten.gather, aten.scatter, aten.scatter_, aten.scatter_add_}


class Generator(torch._C.Generator):
    """A generator, which is registered if it belongs to the device. It gives a CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        generator: Any = super().__new__(cls)
        generators[generator._cdata] = torch.device(device).type == "cuda"
        return generator

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return HERE if generators[self._cdata] else torch.device("cpu")  # type: ignore[attr-defined]


generators: dict[int, bool] = {}  # whether the generator at an address belongs to the device


class RunningDevice(EmulatedDevice):
    """Executes operations on the emulated GPU. Raises `Mismatch` where CUDA fails or races."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, stream = func.overloadpacket, current_stream()
        args, kwargs = autocast(packet, args, dict(kwargs or {}))
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, OnDevice)]
        for tensor in inputs:
            origin, tick = getattr(tensor, "computed", (stream, 0))
            if origin is not stream and tick > max(stream.seen.get(origin, 0), finished.get(origin, 0)):
                raise Mismatch(f"{func}: its stream has not waited for that of {tuple(tensor.shape)}")
        if (generator := kwargs.get("generator")) is not None:
            there = bool(inputs) if kwargs.get("device") is None else kwargs["device"].type != "cpu"
            if generators.get(generator._cdata, False) != there:
                raise Mismatch(f"{func}: the generator belongs to the other device")
        waits = blocks(packet, args, kwargs)
        if waits:
            stream.synchronize()
        result = self.transferred(func, types, args, kwargs)
        stream.ticks += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, OnDevice):
                tensor.computed = (stream, stream.ticks)  # type: ignore[attr-defined]
        if waits:
            stream.synchronize()
        return result

    def transferred(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Execute the operation; a copy from or to pinned memory that does not block is a `Transfer`."""
        packet, stream = func.overloadpacket, current_stream()
        if packet in (aten.copy_, aten._to_copy) and non_blocking(args, kwargs):
            source = args[1] if packet is aten.copy_ else args[0]
            if isinstance(source, OnDevice) and packet is aten._to_copy and leaves_device(kwargs):
                raise Mismatch("an asynchronous copy to the host without an event to wait for: use `to_host`")
            if isinstance(source, OnDevice) and packet is aten.copy_ and is_pinned(args[0]):
                stream.add(Transfer(args[0], source.values.clone(), to_host=True))
                return args[0]
            if is_pinned(source):
                stream.add(Transfer(source, source.clone(), to_host=False))
        return super().__torch_dispatch__(func, types, args, kwargs)

    @staticmethod
    def copies(func: Any, args: Any, kwargs: Any, there: bool) -> None:
        pass

    @staticmethod
    def computes(func: Any, args: Any, kwargs: Any, ours: dict[int, OnDevice], host: list[Tensor]) -> None:
        packet = func.overloadpacket
        if any(tensor.is_meta for tensor in host):
            raise Mismatch(f"{func}: a tensor that C++ created on the device")
        if torch.are_deterministic_algorithms_enabled() and packet in NOT_DETERMINISTIC:
            raise Mismatch(f"{func} has no deterministic form on CUDA")
        if packet in PRODUCTS and not args[-1 if packet is aten.mm else 0].values.dtype.is_floating_point:
            raise Mismatch(f"{func}: CUDA has no products of integers")
        if not ours:
            return
        if packet in INDEXED:  # indices may be on the host, and a value that is a scalar
            host = [args[0], *args[2:3]] if len(args) > 2 else [args[0]]
            host = [tensor for tensor in host if not isinstance(tensor, OnDevice)]
            if host and host[0] is args[0]:
                raise Mismatch(f"{func} indexes a tensor of the host by one of the device")
        if any(tensor.ndim or packet in NO_SCALARS for tensor in host):
            raise Mismatch(f"{func} mixes tensors of host and device: {[tuple(t.shape) for t in host]}")


def non_blocking(args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))


def leaves_device(kwargs: dict[str, Any]) -> bool:
    """Whether the keywords of _to_copy name the host as the target."""
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"


def blocks(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for an operation: it reads values, or copies between host and device."""
    if packet is aten.copy_:
        return not non_blocking(args, kwargs) and isinstance(args[0], OnDevice) != isinstance(
            args[1], OnDevice
        )
    if packet is aten._to_copy:
        crosses = leaves_device(kwargs) if isinstance(args[0], OnDevice) else "device" in kwargs
        return crosses and not non_blocking(args, kwargs)
    return packet in READ


def autocast(packet: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Cast the arguments as autocast does on CUDA. Its kernels do not see the emulated device.

    The casts are not recorded by autograd, so that backward operations get mixed types: they compute in the
    lowest one, or in float32, as the recorded casts would.
    """
    if packet not in LOWER and packet not in FLOAT32:
        return args, kwargs
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, OnDevice)]
    types = {leaf.values.dtype for leaf in leaves} & {torch.float32, torch.bfloat16, torch.float16}
    enabled = getattr(of_thread, "autocast", False)
    if not types or (not enabled and len(types) == 1):
        return args, kwargs
    if packet in FLOAT32:
        dtype = torch.float32
    else:
        dtype = torch.get_autocast_dtype("cuda") if enabled else min(types, key=lambda t: t.itemsize)

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, OnDevice) or leaf.values.dtype not in types or leaf.values.dtype == dtype:
            return leaf
        return OnDevice(leaf.values.to(dtype))

    return tree_map(cast, (args, kwargs))


def set_autocast_enabled(original: Any, device_type: str, enabled: bool) -> None:
    """torch.set_autocast_enabled, with a copy of the value: within a dispatch mode torch gives False."""
    original(device_type, enabled)
    if device_type == "cuda":
        of_thread.autocast = enabled


def conv2d(original: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
    """F.conv2d, with the casts of autocast: it compares the types of its arguments before it dispatches."""
    if isinstance(x, OnDevice) and getattr(of_thread, "autocast", False):
        dtype = torch.get_autocast_dtype("cuda")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return original(x, weight, bias, *args)


def numpy(self: OnDevice, *, force: bool = False) -> Any:
    if not force:
        raise Mismatch("numpy() of a tensor on the device: use .cpu().numpy()")
    return self.values.numpy()


def deepcopied(self: OnDevice, memo: dict[int, Any]) -> Any:
    copy: Any = OnDevice(self.values.clone())
    if isinstance(self, nn.Parameter):
        copy = nn.Parameter(copy, self.requires_grad)
    memo[id(self)] = copy
    return copy


def submit(original: Any, pool: ThreadPoolExecutor, job: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Submit a job that runs on the emulated device: modes of torch belong to a thread."""

    def emulated() -> Any:
        with RunningDevice():
            return job(*args, **kwargs)

    return original(pool, emulated)


CUDA: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "stream": stream,
    "current_stream": current_stream,
    "synchronize": lambda device=None: default_stream.synchronize(),
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "Emulated GPU",
    "get_device_capability": lambda device=None: (8, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=1),
    "is_bf16_supported": lambda including_emulation=True: True,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (2**34, 2**34),
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed_all": lambda seed: None,
}


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Emulate one GPU for whole runs in this process."""
    submit_ = partial(submit, ThreadPoolExecutor.submit)
    methods: Sequence[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.Tensor, "record_stream", lambda self, stream: None),
        (torch.Tensor, "is_pinned", lambda self, device=None: is_pinned(self)),
        (OnDevice, "numpy", numpy),
        (OnDevice, "tolist", lambda self: self.cpu().tolist()),
        (OnDevice, "__format__", lambda self, spec: format(self.cpu(), spec)),
        (OnDevice, "__repr__", lambda self, **options: repr(self.values)),
        (OnDevice, "__deepcopy__", deepcopied),
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None),
        (torch.optim.Optimizer, "_cuda_graph_capture_health_check", lambda self: None),
        (torch, "set_autocast_enabled", partial(set_autocast_enabled, torch.set_autocast_enabled)),
        # as no_grad: tensors of the inference mode cannot wrap others
        (torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else nullcontext()),
        (F, "conv2d", partial(conv2d, F.conv2d)),
        (ThreadPoolExecutor, "submit", lambda pool, *job, **kwargs: submit_(pool, *job, **kwargs)),
    ]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **CUDA))
        for owner, name, replacement in methods:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.callback(prefetcher_of.cache_clear)
        stack.callback(device._pinned.clear)
        stack.callback(finished.clear)
        stack.callback(generators.clear)
        prefetcher_of.cache_clear()
        stack.enter_context(RunningDevice())
        yield
