"""Data-parallel replicas of a network: batch norm synchronised over ranks, gradients averaged over ranks."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_runner.distributed.collectives import all_reduce_sharded
from ssl_runner.distributed.group import world_size


class SyncBatchNorm(_BatchNorm):
    """Batch norm with statistics over the rows of all ranks. All ranks must have the same number of rows.

    torch.nn.SyncBatchNorm does not support CPU tensors, and on CUDA it needs a host-device sync to read the
    number of rows of each rank.

    `after` holds modules that are applied to the output: timm's batch norm layers contain dropout and an
    activation.
    """

    after: tuple[nn.Module, ...] = ()

    @classmethod
    def like(cls, layer: _BatchNorm) -> "SyncBatchNorm":
        """Return a layer that shares parameters, buffers and their names with `layer`."""
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
        """Accept any number of dimensions; dimension 1 holds the features."""

    def forward(self, input: Tensor) -> Tensor:
        """input (B, features, ...) -> output of the same shape."""
        x = super().forward(input) if world_size() == 1 or not self.training else self.normalized(input)
        for part in self.after:
            x = part(x)
        return x

    def normalized(self, input: Tensor) -> Tensor:
        """Normalise by the mean and variance over all ranks, and update the running statistics.

        input (B, features, ...) -> output of the same shape.
        """
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        variance, mean = torch.var_mean(x, dims, correction=0)  # of the rows of this rank
        # relative to the running mean: squaring a large mean would cost the variance digits (cancellation)
        shift = torch.zeros_like(mean) if self.running_mean is None else self.running_mean.to(x)
        mean = mean - shift
        mean, square = (all_reduce_sharded(torch.cat([mean, variance + mean.square()])) / world_size()).chunk(
            2
        )
        variance, mean = square - mean.square(), mean + shift
        if self.track_running_stats and self.num_batches_tracked is not None:
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            rows = world_size() * input.numel() // input.shape[1]
            self.running_mean.lerp_(mean.detach().to(self.running_mean), momentum)
            self.running_var.lerp_((variance.detach() * rows / (rows - 1)).to(self.running_var), momentum)
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)


def sync_batchnorm(module: Any) -> Any:
    """Replace every batch norm of the module by a SyncBatchNorm with the same parameters and names.

    Replaces layers in place and returns the module. Returns it unchanged if W = 1.
    """
    if world_size() == 1:
        return module
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
        return SyncBatchNorm.like(module)
    for name, child in module.named_children():
        setattr(module, name, sync_batchnorm(child))
    return module


def data_parallel(network: nn.Module) -> nn.Module:
    """Wrap the network in DistributedDataParallel, which averages gradients over ranks during backward.

    Returns the network itself if W = 1 or if it has no trainable parameters.
    """
    if world_size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    # buffers need no broadcast: synchronised batch norm keeps them equal on all ranks
    parameters = signature(nn.parallel.DistributedDataParallel).parameters
    no_broadcast: Any = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    return nn.parallel.DistributedDataParallel(network, **no_broadcast)
