"""Copies of nested states in host memory, made without a host-device sync."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies states of one structure, such as those of successive checkpoints, into the same host buffers.

    On CUDA the buffers are pinned and the copies are asynchronous. A copy is valid until the next call.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, state: Any) -> tuple[Any, Callable[[], object]]:
        """Start copying `state`, nested dicts, lists and tuples of tensors and other values.

        Returns the copy, and a function that waits until all its tensors have arrived. The copy holds the
        values that the tensors have in stream order at this call: later steps may change them.
        """
        buffers = iter(self.buffers)
        self.buffers = []
        devices: set[torch.device] = set()

        def to_buffer(tensor: Tensor) -> Tensor:
            tensor, buffer = tensor.detach(), next(buffers, None)
            cuda = tensor.device.type == "cuda"
            if buffer is None or not _fits(buffer, tensor):
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=cuda)
            self.buffers.append(buffer.copy_(tensor, non_blocking=cuda))
            if cuda:
                devices.add(tensor.device)
            return buffer

        copied = map_tensors(to_buffer, state)
        events = []
        for device in devices:
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))

        def wait() -> None:
            for event in events:
                event.synchronize()

        return copied, wait


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Replace every tensor x of nested dicts, lists and tuples by function(x), in new containers."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        result = copy(state)  # keeps the type and attributes, such as _metadata of a module's state dict
        result.update({key: map_tensors(function, value) for key, value in state.items()})
        return result
    if isinstance(state, list | tuple):
        return type(state)([map_tensors(function, value) for value in state])
    return state


def _fits(buffer: Tensor, tensor: Tensor) -> bool:
    """Whether `tensor` can be copied to the buffer without a change of its type and layout."""
    return (
        buffer.dtype == tensor.dtype
        and buffer.shape == tensor.shape
        and buffer.stride() == tensor.stride()
        and buffer.is_pinned() == (tensor.device.type == "cuda")
    )
