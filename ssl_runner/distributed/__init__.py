"""Data-parallel training on W ranks: process group, failure handling, collectives with and without gradients.

Without a process group (W = 1) every collective is the identity.

Each rank holds an equal shard of the rows of a batch, and all ranks compute the same loss, that of the global
batch. DistributedDataParallel averages gradients over ranks, so each rank must compute W times the gradient
contributed by its shard. The differentiable collectives (`collectives`) include this factor. A plain in-place
`dist.all_reduce` yields 1/W of this gradient: autograd does not record that the sum depends on all ranks.
"""

from ssl_runner.distributed.batch_norm import SyncBatchNorm
from ssl_runner.distributed.collectives import (
    all_gather,
    all_gather_replicated,
    all_reduce_replicated,
    all_reduce_sharded,
    all_reduce_sum,
    reduce_scatter,
    shard_indices,
    unshard,
)
from ssl_runner.distributed.devices import check_devices
from ssl_runner.distributed.group import (
    PeerFailed,
    RankInfo,
    finish,
    is_main_process,
    local_only,
    on_peer_failure,
    propagate_failures,
    rank,
    rank_info,
    report_failure,
    start,
    world_size,
)
from ssl_runner.distributed.network import data_parallel, sync_batchnorm
from ssl_runner.distributed.objects import (
    AsyncMax,
    all_gather_object,
    broadcast_object,
    rank_zero_first,
    release_ranks,
)

__all__ = [
    "AsyncMax",
    "PeerFailed",
    "RankInfo",
    "SyncBatchNorm",
    "all_gather",
    "all_gather_object",
    "all_gather_replicated",
    "all_reduce_replicated",
    "all_reduce_sharded",
    "all_reduce_sum",
    "broadcast_object",
    "check_devices",
    "data_parallel",
    "finish",
    "is_main_process",
    "local_only",
    "on_peer_failure",
    "propagate_failures",
    "rank",
    "rank_info",
    "rank_zero_first",
    "reduce_scatter",
    "release_ranks",
    "report_failure",
    "shard_indices",
    "start",
    "sync_batchnorm",
    "unshard",
    "world_size",
]
