"""Batch norm with statistics over the rows of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_runner.distributed.collectives import all_reduce_sharded
from ssl_runner.distributed.group import world_size

SMALLEST = 1e-30  # eps where only the variance is wanted: the inverse of a zero variance stays finite


class SyncBatchNorm(_BatchNorm):
    """Batch norm with statistics over the rows of all ranks. All ranks must have the same number of rows.

    torch.nn.SyncBatchNorm does not support CPU tensors, and on CUDA it needs a host-device sync to read the
    number of rows of each rank. On CUDA, `FusedBatchNorm` computes what `normalized` computes elsewhere.

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
        local = world_size() == 1 or not self.training
        x = super().forward(input) if local else self.synchronized(input)
        for part in self.after:
            x = part(x)
        return x

    @torch.compiler.disable  # compiled, the all-reduce of `normalized` gives wrong gradients
    def synchronized(self, input: Tensor) -> Tensor:
        """Normalise with statistics of all ranks: by CUDA's kernels or by tensor operations."""
        return self.fused(input) if input.is_cuda else self.normalized(input)

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
        self.update_running(mean.detach(), variance.detach(), world_size() * rows_of(input))
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    def fused(self, input: Tensor) -> Tensor:
        """Equal `normalized` up to rounding, with PyTorch's kernels for CUDA.

        input (B, features, ...) -> output of the same shape, dtype and memory format.
        """
        output, mean, variance = FusedBatchNorm.apply(input, self.weight, self.bias, self.eps)
        self.update_running(mean, variance, world_size() * rows_of(input))
        return output

    def update_running(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        """Update the running statistics by mean and variance (features,) of `rows` rows, without a sync."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum: Any = self.momentum  # None: the mean over all batches
        if momentum is None:
            momentum = self.num_batches_tracked.to(self.running_mean).reciprocal()
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((variance * rows / (rows - 1)).to(self.running_var), momentum)


class FusedBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance over all ranks.

    Each direction reads x twice, like batch norm on one GPU, and all-reduces one tensor of 2 F numbers. The
    ranks have equally many rows, so counts are not exchanged.

    Forward all-reduces the sums over ranks of m and v + m^2, with m and v mean and variance of a rank. They
    are float64: variance = E[v + m^2] - mean^2 then keeps the precision of float32 for means up to about 10^4
    standard deviations, without a shift. Backward all-reduces the sums of g and of g (x - mean), with g the
    gradient of y.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, F, ...), weight and bias (F,) -> y like x, mean and variance (F,) without gradient.

        The statistics are float32 for a half-precision x, and have the dtype of x otherwise.
        """
        ctx.format = memory_format(x)
        x = x.contiguous(memory_format=ctx.format)
        m, inverse = torch.batch_norm_stats(x, SMALLEST)
        moments = torch.empty(2, len(m), dtype=torch.float64, device=m.device)
        first, second = moments.unbind()
        first.copy_(m)
        torch.addcmul(inverse.pow(-2), first, first, out=second)
        dist.all_reduce(moments)
        moments /= world_size()
        variance = torch.addcmul(second, first, first, value=-1).clamp_min_(0).to(m)
        mean, inverse = first.to(m), (variance + eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.rows = world_size() * rows_of(x)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # no zeros for their gradients
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=ctx.format)
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, *needed
        )
        of_x = None
        if needed[0]:
            totals = torch.cat(sums)
            dist.all_reduce(totals)
            of_y, of_y_xmu = totals.chunk(2)
            rows = torch.full((1,), ctx.rows, dtype=torch.int32, device=x.device)
            weight = None if weight is None else weight.to(mean)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, of_y, of_y_xmu, rows)
        return of_x, of_weight if needed[1] else None, of_bias if needed[2] else None, None


def rows_of(x: Tensor) -> int:
    """Number of values per feature of x (B, F, ...)."""
    return x.numel() // x.shape[1]


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels-last (2-d or 3-d) if x has it, else contiguous."""
    formats = (torch.channels_last, torch.channels_last_3d)
    return next((f for f in formats if x.is_contiguous(memory_format=f)), torch.contiguous_format)
