"""Batched augmentation: uint8 images (n, C, H, W) -> views X (V n, C, h, w), with random parameters per row.

X is view-major. If the policies have several sizes, X is a list with one such tensor per size. The random
parameters of all rows are sampled first. The views are then computed row by row on a CPU (`cpu_kernels`), and
for the whole batch on other devices, by pure tensor functions with one parameter per row (`geometry`,
`color`). Both agree with torchvision.transforms.functional on one image with
equal parameters. Images are float in [0, 1]; normalisation is the last step.

On other devices than a CPU, random numbers are drawn first and `views_from_uniforms` computes the views from
them: on the device, with static shapes and without copies from the host, so that `Augment.compile` fuses it
into a few kernels and a CUDA graph can hold it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_runner.batch import ViewTensors
from ssl_runner.errors import one_line
from ssl_runner.numerics import usual_defaults
from ssl_runner.view_layout import RULES, by_side, layout, view_count
from ssl_runner.views.geometry import to_unit
from ssl_runner.views.policy import Policy
from ssl_runner.views.sampler import MAX_DRAWS, Params, ParamSampler, UniformSampler, ViewIndex

__all__ = ["IMAGE_FORMAT", "Augment", "ViewFormat", "normalize", "numba_works", "to_unit"]


class ViewFormat(NamedTuple):
    """Side of the views in pixels (None: that of the images), and their data type and memory format."""

    side: int | None = None
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    def size(self, images: Tensor) -> tuple[int, int]:
        """(height, width) of the views of images (n, C, H, W)."""
        return (self.side, self.side) if self.side else (images.shape[2], images.shape[3])


IMAGE_FORMAT = ViewFormat()  # as the images: float32, contiguous, of the same size


class Augment:
    """Computes V augmented views of every image of a batch.

    `policies` maps names to the arguments of a `Policy`, and optionally

    count  number of views of the policy. Views are in the order of the policies. Without counts, view v uses
           policy v mod len(policies), so a single policy works for any V.
    size   side of the views in pixels, instead of that of the view format

    Raises ValueError if there is no policy, an argument is invalid, or only some policies have a count.
    """

    def __init__(self, policies: Mapping[str, Mapping[str, Any]]):
        if not policies:
            raise ValueError(
                "views.policies={}: expected at least one policy; add one, such as {all: {flip: 0.5}}"
            )
        sizes, counts = layout(policies)
        self.names = [*policies]
        self.sizes, self.counts = [*sizes.values()], [*counts.values()]
        self.total = view_count(policies)
        self.policies = []
        for name, settings in policies.items():
            try:
                self.policies.append(Policy(**{key: settings[key] for key in settings if key not in RULES}))
            except TypeError as error:
                raise ValueError(f"views.policies.{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"views.policies.{name}.{error}") from error
        self.from_uniforms: Callable[..., Tensor] = views_from_uniforms

    def compile(self) -> None:
        """Compile the views of devices other than a CPU. The kernels of a CPU are always compiled."""
        self.from_uniforms = torch.compile(views_from_uniforms, fullgraph=True, dynamic=False)

    @usual_defaults()
    def __call__(
        self,
        images: Tensor,
        V: int,
        mean: Tensor,
        std: Tensor,
        generator: torch.Generator,
        rank: int = 0,
        ranks: int = 1,
        view_format: ViewFormat = IMAGE_FORMAT,
    ) -> ViewTensors:
        """Return V normalised views of every image.

        images     (n, C, H, W) uint8
        mean, std  (C,) per-channel statistics in [0, 1]
        returns    (V n, C, h, w) float32, or as `view_format` states; row v n + k is view v of image k. If
                   the policies have several sizes, a list with one such tensor per size; the views of a size
                   are in their order, and the sizes in the order of their first view

        If the images are shard `rank` of a batch that is split into `ranks` equal shards, their views equal
        those that they have in the whole batch: parameters are drawn for all rows of the batch, and those of
        the shard are selected.

        Raises ValueError if V is not the sum of the counts.
        """
        if self.total not in (0, V):
            raise ValueError(f"V={V}: expected {self.total}, the sum of the counts of the policies")
        blocks = [
            self._block(views, images, mean, std, generator, (rank, ranks), view_format._replace(side=side))
            for side, views in by_side(self.sizes, self.counts, V, view_format.side).items()
        ]
        return blocks if len(blocks) > 1 else blocks[0]

    def policies_of_views(self, V: int) -> list[str]:
        """Names of the policies of the views, in the order of the views; "" if there is only one policy."""
        if len(self.names) == 1:
            return [""] * V
        found = []
        for members in by_side(self.sizes, self.counts, V, None).values():
            policy = {view: self.names[p] for p, views in members.items() for view in views}
            found += [policy[view] for view in sorted(policy)]
        return found

    def _block(
        self,
        numbers: Mapping[int, Sequence[int]],
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        generator: torch.Generator,
        shard: tuple[int, int],
        view_format: ViewFormat,
    ) -> Tensor:
        """Compute the views of one size.

        numbers  of the policies, and of the views of each
        shard    rank, ranks
        """
        policies, views = [self.policies[p] for p in numbers], [*numbers.values()]
        (rank, ranks), n, device, size = shard, len(images), images.device, view_format.size(images)
        rows = [len(own) * ranks * n for own in views]  # of each policy in the whole batch
        if device.type != "cpu":
            uniforms = [torch.rand(r, MAX_DRAWS, device=device, generator=generator) for r in rows]
            uniforms = [of_shard(u, len(own), rank, ranks) for u, own in zip(uniforms, views, strict=True)]
            return self.from_uniforms(policies, views, images, mean, std, uniforms, view_format)
        image_size = (images.shape[2], images.shape[3])
        params = [
            policy.sample_params(ParamSampler(r, device, generator), image_size, size)
            for policy, r in zip(policies, rows, strict=True)
        ]
        if not numba_works():
            params = [
                {name: of_shard(values, len(own), rank, ranks) for name, values in drawn.items()}
                for drawn, own in zip(params, views, strict=True)
            ]
            return batched_views(policies, views, images, mean, std, params, view_format)
        X = torch.empty(sum(map(len, views)) * n, images.shape[1], *size)
        for policy, drawn, own in zip(policies, params, views, strict=True):
            param = of_shard(torch.arange(len(own) * ranks * n), len(own), rank, ranks)
            row = torch.tensor(own)[param // (ranks * n)] * n + param % n
            augment_rows_cpu(policy, drawn, ViewIndex(param % n, row, param), images, X, mean, std)
        return X.to(view_format.dtype, memory_format=view_format.memory_format)


def of_shard(values: Tensor, views: int, rank: int, ranks: int) -> Tensor:
    """Select the rows of one rank from values (views * ranks * n, ...) of the whole batch."""
    return values.unflatten(0, (views, ranks, -1))[:, rank].flatten(0, 1)


def views_from_uniforms(
    policies: Sequence[Policy],
    views: Sequence[Sequence[int]],
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    uniforms: Sequence[Tensor],
    view_format: ViewFormat,
) -> Tensor:
    """Compute views of one size from uniform numbers in [0, 1), (rows, MAX_DRAWS) for each policy.

    `views` are the numbers of the views of each policy. A row is a view of this rank's images. Pure, and
    static in all but tensors.
    """
    image_size, size = (images.shape[2], images.shape[3]), view_format.size(images)
    params = [
        policy.sample_params(UniformSampler(numbers), image_size, size)
        for policy, numbers in zip(policies, uniforms, strict=True)
    ]
    return batched_views(policies, views, images, mean, std, params, view_format)


def batched_views(
    policies: Sequence[Policy],
    views: Sequence[Sequence[int]],
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    params: Sequence[Params],
    view_format: ViewFormat,
) -> Tensor:
    """Compute views of one size with batched operations, from the parameters of each policy's rows."""
    made: dict[int, Tensor] = {}
    for policy, own, drawn in zip(policies, views, params, strict=True):
        x = policy(images.repeat(len(own), 1, 1, 1), drawn, view_format.size(images))
        x = normalize(x, mean, std).to(view_format.dtype, memory_format=view_format.memory_format)
        if len(policies) == 1:
            return x
        made |= dict(zip(own, x.chunk(len(own)), strict=True))
    return torch.cat([made[v] for v in range(len(made))])


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
    make_views(images, X, index, params, mean, std, kernel, threshold)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std for x (B, C, H, W) in [0, 1], mean and std (C,). Also used in evaluation."""
    return (x - mean[:, None, None]).mul_(1 / std[:, None, None])
