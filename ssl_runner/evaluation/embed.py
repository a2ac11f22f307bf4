"""Features of a trained network for a data set or a folder of images, written block by block."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_runner.data.dataset import DataSet
from ssl_runner.data.decode import DAMAGED, large_images
from ssl_runner.data.images import Images
from ssl_runner.data.layouts import Finder
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError, one_line
from ssl_runner.evaluation.tables import FORMATS, Block, check_target
from ssl_runner.pretrained import Pretrained, Transform
from ssl_runner.progress import image_progress
from ssl_runner.runs.files import atomic_write
from ssl_runner.views import normalize, to_unit

Batches = Iterator[tuple[Tensor, Block]]  # normalised images (n, C, S, S), and columns that describe them


class Folder:
    """The image files in and below a folder, sorted by path.

    Symbolic links are followed. `skipped` counts the files that are not read: those that are no images and,
    with `skip_errors`, images that cannot be read. Raises UsageError if there are no images.
    """

    def __init__(self, root: Path, skip_errors: bool = False):
        self.root, self.skip_errors = root, skip_errors
        finder = Finder(skip_unreadable=skip_errors)
        self.files, self.skipped = sorted(finder.below(root, set())), finder.skipped
        if not self.files:
            raise UsageError(
                f"{printable(root)}: expected image files (.jpg, .png, .webp, ...), found none"
                f" ({str(self.skipped) or 'an empty folder'}); give another folder"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, path: Path) -> str:
        """The path within the folder; bytes that are not UTF-8 become escapes."""
        return printable(path.relative_to(self.root))

    def batches(self, transform: Transform, batch_size: int, device: torch.device) -> Batches:
        """Yield all images, with the column `path`. Threads decode two batches ahead.

        Raises UsageError for a file that cannot be read, unless `skip_errors`.
        """
        chunks = iter([self.files[i : i + batch_size] for i in range(0, len(self.files), batch_size)])
        waiting: deque[list[Future]] = deque()
        with large_images(), ThreadPoolExecutor(os.cpu_count()) as threads:
            try:
                while True:
                    while len(waiting) < 3 and (chunk := next(chunks, None)):
                        waiting.append([threads.submit(self.read, path, transform) for path in chunk])
                    if not waiting:
                        return
                    read = [result.result() for result in waiting.popleft()]
                    kept = [(path, image) for path, image in read if image is not None]
                    for path, image in read:
                        if image is None:
                            self.skipped.add("unreadable", path)
                    if kept:
                        x = torch.stack([image for _, image in kept]).to(device)
                        yield x, {"path": np.array([self.name(path) for path, _ in kept])}
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def read(self, path: Path, transform: Transform) -> tuple[Path, Tensor | None]:
        """One image after the transform, or None if it is to be left out."""
        try:
            with Image.open(path) as image:
                return path, transform(image)
        except (*DAMAGED, UsageError) as error:
            if not self.skip_errors:
                raise UsageError(
                    f"{self.name(path)}: expected a readable image ({one_line(error)}); repair or remove it,"
                    " or give --skip-errors"
                ) from error
            return path, None


def splits(data: DataSet) -> dict[str, Images]:
    """Every image of the data set once, by split: train, val, test, unlabeled."""
    labelled = torch.cat([data.train.indices, data.val.indices])
    rest = data.pretrain.indices[~torch.isin(data.pretrain.indices, labelled)]
    unlabeled = replace(data.evaluation("pretrain"), indices=rest)
    return {"train": data.train, "val": data.val, "test": data.test, "unlabeled": unlabeled}


def data_set_batches(data: DataSet, batch_size: int) -> Batches:
    """Yield all images of a data set, with the columns `index`, `split`, `label` (-1: none) and `class`.

    `index` counts the images of the data set in the order of its reader. `class` is "" without a label. For
    images read from files, `path` is the name of the file.
    """
    names = np.array([*map(str, data.classes), ""])  # the last one for label -1
    for split, images in splits(data).items():
        if not len(images):
            continue
        order = torch.arange(len(images))
        loaded = images.batches(order, batch_size, data.mean.device)
        for (pixels, y), indices in zip(loaded, images.indices.split(batch_size), strict=True):
            labels = y.cpu().numpy()
            columns = {"index": indices.numpy(), "split": np.full(len(labels), split), "label": labels}
            columns["class"] = names[labels]
            if data.files is not None:
                columns["path"] = np.array([data.files[index] for index in indices.tolist()])
            yield normalize(to_unit(pixels), data.mean, data.std), columns


@torch.inference_mode()
def embed(network: Pretrained, batches: Batches, total: int, projections: bool, write: Callable) -> int:
    """Write the features (n, width) of all images, and with `projections` the embeddings (n, K).

    `write` is called with one Block per batch. Returns the number of images.
    """
    rows = 0
    with image_progress("embed", total) as bar:
        for x, columns in batches:
            features = network.backbone(x).flatten(1).float()
            block = {**columns, "features": features.cpu().numpy()}
            if projections and network.projector is not None:
                block["projections"] = network.projector(features).float().cpu().numpy()
            write(block)
            rows += len(x)
            bar.update(len(x))
    return rows


def embed_to_file(
    network: Pretrained, batches: Batches, total: int, projections: bool, target: Path, overwrite: bool
) -> int:
    """Write the table of `embed` to a .npz, .csv or .parquet file, atomically. Returns the number of images.

    Raises UsageError if `target` exists and `overwrite` is False, or if no image is left.
    """
    check_target(target, overwrite)
    kind = FORMATS[target.suffix.lower()]
    with atomic_write(target) as file, closing(kind(file, target.parent)) as table:
        rows = embed(network, batches, total, projections, table.write)
        if not rows:
            raise UsageError(f"-o {target}: expected at least one readable image, found none")
        table.finish()
    return rows
