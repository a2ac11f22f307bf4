"""Batched augmentation: uint8 images (n, C, H, W) -> views X (V n, C, H, W), with random parameters per row.

X is view-major. The random parameters of all rows are sampled first. The views are then computed row by row
on a CPU (`cpu_kernels`), and for the whole batch on other devices, by pure tensor functions with one
parameter per row (`geometry`, `color`). Both agree with torchvision.transforms.functional on one image with
equal parameters. Images are float in [0, 1]; normalisation is the last step.
"""

import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ssl_runner.device import to_device
from ssl_runner.errors import one_line
from ssl_runner.views.policy import Policy
from ssl_runner.views.sampler import Params, ParamSampler, ViewIndex


class Augment:
    """Computes V augmented views of every image of a batch.

    `policies` maps names to the arguments of a `Policy`. View v uses policy number v mod len(policies), so a
    single policy works for any V. Raises ValueError if there is no policy or an argument is invalid.
    """

    def __init__(self, policies: Mapping[str, Mapping[str, Any]]):
        if not policies:
            raise ValueError(
                "views.policies={}: expected at least one policy; add one, such as {all: {flip: 0.5}}"
            )
        self.policies = []
        for name, settings in policies.items():
            try:
                self.policies.append(Policy(**settings))
            except TypeError as error:
                raise ValueError(f"views.policies.{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"views.policies.{name}.{error}") from error

    def __call__(
        self,
        images: Tensor,
        V: int,
        mean: Tensor,
        std: Tensor,
        generator: torch.Generator,
        rank: int = 0,
        ranks: int = 1,
        side: int | None = None,
    ) -> Tensor:
        """Return V normalised views of every image.

        images     (n, C, H, W) uint8
        mean, std  (C,) per-channel statistics in [0, 1]
        side       of the views in pixels, by default that of the images
        returns    (V n, C, H, W) float32, or (V n, C, side, side); row v n + k is view v of image k

        If the images are shard `rank` of a batch that is split into `ranks` equal shards, their views equal
        those that they have in the whole batch: parameters are drawn for all rows of the batch, and those of
        the shard are selected.
        """
        n, C, H, W = images.shape
        height, width = (side, side) if side else (H, W)
        X = torch.empty(V * n, C, height, width, device=images.device)
        row_by_row = images.device.type == "cpu" and numba_works()
        compute = augment_rows_cpu if row_by_row else augment_batch
        for number, policy in enumerate(self.policies[:V]):
            v = torch.arange(number, V, len(self.policies))
            rows = len(v) * ranks * n  # of this policy in the whole batch
            sampler = ParamSampler(rows, images.device, generator)
            params = policy.sample_params(sampler, (H, W), (height, width))
            shard = torch.arange(rows).view(len(v), ranks, n)[:, rank].flatten()
            index = ViewIndex(image=shard % n, row=v[shard // (ranks * n)] * n + shard % n, param=shard)
            compute(policy, params, index, images, X, mean, std)
        return X


@cache
def numba_works() -> bool:
    """Return True if numba can be imported. Otherwise write one line to standard error, once per process.

    Besides ImportError, `import numba` raises OSError if its LLVM library cannot be loaded, and
    AttributeError or SystemError with unsupported versions of other packages, such as coverage and numpy.
    """
    try:
        import_module("numba")
    except (ImportError, OSError, AttributeError, SystemError) as error:
        reason = one_line(error)
        print(f"numba cannot be used ({reason}): views are computed several times slower", file=sys.stderr)
        return False
    return True


def augment_rows_cpu(
    policy: Policy, params: Params, index: ViewIndex, images: Tensor, X: Tensor, mean: Tensor, std: Tensor
) -> None:
    """Compute B views of images (n, C, H, W) uint8 on a CPU, one at a time. Writes them into X (N, C, h, w).

    params  sampled parameters of R rows
    index   of the B views, into images, X and params
    """
    from ssl_runner.views.cpu_kernels import make_views  # imports numba

    kernel = policy.kernel((images.shape[2], images.shape[3]), (X.shape[2], X.shape[3]))
    threshold = policy.solarize["threshold"] if policy.solarize else 0.0
    make_views(images, X, index, params.numbers | params.choices, mean, std, kernel, threshold)


def augment_batch(
    policy: Policy, params: Params, index: ViewIndex, images: Tensor, X: Tensor, mean: Tensor, std: Tensor
) -> None:
    """Compute the same as `augment_rows_cpu` on any device, by batched operations on all views."""
    if policy.jitter:  # sort by hue position so that each group is one contiguous slice
        index = index.select(params.choices["hue_position"][index.param].argsort(stable=True))
    x = to_unit(images.index_select(0, to_device(index.image, images.device)))
    x = policy(x, params.select(index.param, images.device), (X.shape[2], X.shape[3]))
    X.index_copy_(0, to_device(index.row, images.device), normalize(x, mean, std))


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]."""
    return images.float().mul_(1 / 255)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std for x (B, C, H, W) in [0, 1], mean and std (C,). Also used in evaluation."""
    return (x - mean[:, None, None]).mul_(1 / std[:, None, None])
