"""Multi-view batches: shuffled images -> X (V n, C, h, w), V augmented views of each, and their Batch.

If the policies of the views have several sizes, X is a list with one view-major tensor per size.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ssl_runner import distributed
from ssl_runner.batch import Batch, ViewTensors
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.images import Images
from ssl_runner.device import to_device
from ssl_runner.views import IMAGE_FORMAT, Augment, ViewFormat


class MultiViewLoader:
    """Batches of V augmented views of a data set's pretraining images.

    An epoch has `steps_per_epoch` batches of `batch_size` images, counted over all ranks; remaining images
    are left out. The order of an epoch depends on `seed` and the epoch only. `view_generator`, on the data's
    device, draws the augmentations. `resolutions` are sides of the views in pixels (None: that of the
    evaluation images), each used for an equal part of `epochs` (progressive resizing).

    Each rank yields its own chunk of every batch. An image's views do not depend on the number of ranks.
    """

    def __init__(
        self,
        data: DataSet,
        augment: Augment,
        *,
        V: int,
        batch_size: int,
        seed: int,
        epochs: int = 1,
        resolutions: Sequence[int | None] = (None,),
    ):
        self.data, self.augment, self.V, self.batch_size, self.seed = data, augment, V, batch_size, seed
        self.epochs, self.resolutions = epochs, resolutions
        self.device = data.mean.device
        self.steps_per_epoch = len(data.pretrain) // batch_size
        self.after_batch: Callable[[], object] = lambda: None  # called after each batch of `batches`
        self._rewind()

    def _rewind(self) -> None:
        self.view_generator = torch.Generator(self.device).manual_seed(self.seed)
        self._rewind_order()

    def _rewind_order(self) -> None:
        self.order_epoch, self.order_state = 0, torch.Generator("cpu").manual_seed(self.seed).get_state()

    def restarted(self) -> "MultiViewLoader":
        """A loader with the same options, at its initial state."""
        loader = copy(self)
        loader._rewind()
        return loader

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in order, as positions among the pretraining images.

        (steps_per_epoch * batch_size,) int64.
        """
        if epoch < self.order_epoch:
            self._rewind_order()
        n, generator = len(self.data.pretrain), torch.Generator("cpu")
        generator.set_state(self.order_state)
        for _ in range(self.order_epoch, epoch):
            torch.randperm(n, generator=generator)
        self.order_epoch, self.order_state = epoch, generator.get_state()
        return torch.randperm(n, generator=generator)[: self.steps_per_epoch * self.batch_size]

    def resolution(self, step: int) -> int | None:
        """Side of the views in pixels at `step`, counted over all epochs; None for `data.view_size`."""
        part = step * len(self.resolutions) // (self.epochs * self.steps_per_epoch)
        return self.resolutions[min(part, len(self.resolutions) - 1)]

    def batches(
        self,
        epoch: int,
        start: int = 0,
        *,
        size: int | None = None,
        whole_batch: bool = False,
        view_format: ViewFormat = IMAGE_FORMAT,
    ) -> Iterator[tuple[ViewTensors, Batch]]:
        """Yield X (V n, C, h, w), view-major, and its Batch, for the batches of an epoch from `start` on.

        `size` overrides the number of images per batch. `view_format` states type and memory format of X.
        With `whole_batch` the Batch describes the images of all ranks, in the order of the ranks. X always
        holds the views of this rank's images.
        """
        size = size or self.batch_size
        order = self.order(epoch)[start * size :]
        if not len(order):
            return
        rank, ranks, pretrain = distributed.rank(), distributed.world_size(), self.data.pretrain
        whole = order.split(size)
        shards = [positions.chunk(ranks)[rank] for positions in whole]
        loaded = pretrain.batches(torch.cat(shards), len(shards[0]), self.device)
        first = epoch * self.steps_per_epoch + start
        for number, (images, labels) in enumerate(loaded):
            indices = pretrain.indices[(whole if whole_batch else shards)[number]]
            if len(indices) > len(labels):
                labels = pretrain.labels[to_device(indices, self.device)]
            chosen = view_format._replace(side=self.resolution(first + number))
            X = self._views(images, self.view_generator, rank, ranks, chosen)
            yield X, Batch(indices, labels, self.V, len(self.data.classes))
            self.after_batch()

    def fixed_batch(self, images: Images, positions: Tensor) -> tuple[ViewTensors, Batch]:
        """X (V n, C, H, W), the same views in every call, of the images at positions (n,), and its Batch."""
        [(pixels, labels)] = images.stored.batches(positions, len(positions), self.device)
        X = self._views(pixels, torch.Generator(self.device).manual_seed(self.seed))
        return X, Batch(images.indices[positions], labels, self.V, len(self.data.classes))

    def _views(
        self,
        images: Tensor,
        generator: torch.Generator,
        rank: int = 0,
        ranks: int = 1,
        view_format: ViewFormat = IMAGE_FORMAT,
    ) -> ViewTensors:
        view_format = view_format._replace(side=view_format.side or self.data.view_size)
        return self.augment(
            images, self.V, self.data.mean, self.data.std, generator, rank, ranks, view_format
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "order_epoch": self.order_epoch,
            "order_state": self.order_state,
            "view_generator": self.view_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order_epoch, self.order_state = state["order_epoch"], state["order_state"]
        self.view_generator.set_state(state["view_generator"])
