"""Data-parallel replicas of a network: batch norm synchronised over ranks, gradients averaged over ranks."""

from inspect import signature
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_runner.distributed.batch_norm import SyncBatchNorm
from ssl_runner.distributed.group import world_size


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
    # gradients are views of the communication buffers: one copy of them less in memory and in time
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, **no_broadcast)
