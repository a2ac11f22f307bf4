"""torch.distributed for one training run: ranks, failures, collectives with gradients. With one process everything is the identity.

Every rank holds an equal part of a batch's rows and computes the same loss, that of all rows. DistributedDataParallel averages
gradients over ranks, so each rank's gradient is W times its own share of the loss's gradient, with W ranks. (An in-place
all_reduce would give 1/W of it: autograd does not see that the sum contains the other ranks' rows.)
"""

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
from ssl_runner.distributed.group import (
    PeerFailed,
    RankInfo,
    finish,
    is_main_process,
    local_only,
    propagate_failures,
    rank,
    rank_info,
    report_failure,
    start,
    world_size,
)
from ssl_runner.distributed.network import SyncBatchNorm, data_parallel, sync_batchnorm
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
    "data_parallel",
    "finish",
    "is_main_process",
    "local_only",
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
