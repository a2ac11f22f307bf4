"""The network in each of several processes: batch norm over the rows of all, gradients averaged over all."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_runner.distributed import pooled, size


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all processes, as many in each. torch.nn.SyncBatchNorm leaves out CPUs, and on CUDA makes the
    host wait for the numbers of rows. `after` is what the layer that it takes the place of does with its result: timm's have an
    activation in them."""

    after: tuple[nn.Module, ...] = ()

    @classmethod
    def like(cls, layer: _BatchNorm) -> "SyncBatchNorm":
        """A layer with the parameters and buffers of another one: the same ones, under the same names."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        new.__dict__ = {
            **new.__dict__,
            "_parameters": layer._parameters,
            "_buffers": layer._buffers,
            "training": layer.training,
        }
        new.after = tuple(
            part for name in ("drop", "act") if isinstance(part := getattr(layer, name, None), nn.Module)
        )
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes any number of dimensions, the second one of features."""

    def forward(self, input: Tensor) -> Tensor:
        """input (B, features, ...) -> the same shape."""
        x = super().forward(input) if size() == 1 or not self.training else self.normalized(input)
        for part in self.after:
            x = part(x)
        return x

    def normalized(self, input: Tensor) -> Tensor:
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        variance, mean = torch.var_mean(x, dims, correction=0)  # of this process's rows
        near = torch.zeros_like(mean) if self.running_mean is None else self.running_mean.to(x)
        mean = mean - near  # a small number, the square of which takes no digits from the variance
        mean, square = (pooled(torch.cat([mean, variance + mean.square()])) / size()).chunk(2)
        variance, mean = square - mean.square(), mean + near
        if self.track_running_stats and self.num_batches_tracked is not None:
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            rows = size() * input.numel() // input.shape[1]
            self.running_mean.lerp_(mean.detach().to(self.running_mean), share)
            self.running_var.lerp_((variance.detach() * rows / (rows - 1)).to(self.running_var), share)
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)


def synchronized(module: Any) -> Any:
    """The module with all its batch norms taken over the rows of all processes; parameters and their names stay."""
    if size() == 1:
        return module
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
        return SyncBatchNorm.like(module)
    for name, child in module.named_children():
        setattr(module, name, synchronized(child))
    return module


def averaging(network: nn.Module) -> nn.Module:
    """The network, whose gradients are then averaged over the processes while they are computed."""
    if size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    parameters = signature(
        nn.parallel.DistributedDataParallel
    ).parameters  # buffers are alike: batch norm has seen the same rows
    without: Any = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    return nn.parallel.DistributedDataParallel(network, **without)
