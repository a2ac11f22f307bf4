"""Data sets as two tensors, images (n, C, H, W) uint8 and labels (n,) int64, and the seeded splits of their rows."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import psutil
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ssl_runner import memory
from ssl_runner.errors import Refused
from ssl_runner.relation import copied

MEMORY_SHARE = 0.5  # of the free memory that the images may take before they stay on the host


@dataclass
class Source:
    """What a data set's loader returns: all its images once, and which rows are what.

    images (n, C, H, W) uint8; labels (n,) int64, -1 where there is none; train, test, unlabeled: row numbers.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    train: np.ndarray
    test: np.ndarray
    unlabeled: np.ndarray
    mapped: bool = False  # the images are a file, of which pages are read when they are touched


@dataclass
class Images:
    """Some rows of a data set, without a copy: `images` and `labels` hold every row, `rows` (n,) says which belong.
    `resident` says that the images are in the device's own memory; else they are on the host or in a mapped file."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    resident: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def y(self) -> Tensor:
        """The labels (n,) of these rows, on the device of the labels."""
        return self.labels[self.rows.to(self.labels.device)]

    def batches(
        self, order: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `order` (m,), positions among these rows: images (b, C, H, W) uint8 and labels (b,), on the device.

        Images that are not resident are gathered and copied by a thread, one batch ahead of the step that needs them.
        """
        if self.resident:
            for rows in copied(self.rows[order], device).split(batch_size):
                yield self.images[rows], self.labels[rows]
            return
        chunks = self.rows[order].split(batch_size)
        copier = Copier(device)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(copier.fetch, self, chunks[0])
            for following in [*chunks[1:], None]:
                ready = copier.ready(ahead.result())
                if following is not None:
                    ahead = thread.submit(copier.fetch, self, following)
                yield ready


class Copier:
    """Copies batches from the host to a device; on CUDA through pinned memory and a stream of its own, beside the compute."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, images: Images, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = images.images[rows]
        if self.stream is None:
            return batch.to(self.device), images.labels[rows.to(self.device)]
        with torch.cuda.stream(self.stream):
            batch, rows = (tensor.pin_memory().to(self.device, non_blocking=True) for tensor in (batch, rows))
            return batch, images.labels[rows]

    def ready(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Makes the compute stream wait for the copy; the host does not wait."""
        if self.stream is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in batch:
                tensor.record_stream(compute)
        return batch


@dataclass
class DataSet:
    """The splits of one data set. `pretrain` is `train` and whatever is unlabelled; `val` comes out of the training set and
    is never trained on before it has selected what is selectable; `test` is scored once. mean, std (C,) in [0, 1] are those of
    the pretraining images."""

    name: str
    classes: list[str]
    pretrain: Images
    train: Images
    val: Images
    test: Images
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[2]


def load(
    source: Callable[[], Source],
    name: str,
    val: float,
    subset: int | None,
    split_seed: int,
    location: str,
    device: torch.device,
) -> DataSet:
    """Reads a source, takes a class-balanced subset of its training images, splits off the validation share and puts the images
    on the device if `location` says so ("auto": if they take at most half of its free memory)."""
    data = source()
    train, unlabeled = data.train, data.unlabeled
    labels = data.labels.numpy()
    if subset is not None:
        if not len(data.classes) <= subset <= len(train):
            raise Refused(
                f"dataset.subset={subset}: {name} has {len(train)} training images in {len(data.classes)} classes;"
                f" give a number from {len(data.classes)} to {len(train)}, or null for all"
            )
        train = train[balanced_order(labels[train], split_seed)[:subset]]
        unlabeled = np.random.default_rng(split_seed).permutation(unlabeled)[:subset]
    counts = np.bincount(labels[train], minlength=len(data.classes))
    held_out = round(val * len(train))
    if counts.min() < 2 or not len(data.classes) <= held_out <= len(train) - len(data.classes):
        raise Refused(
            f"dataset.val={val} of {len(train)} training images leaves a class without an image to train or to validate on:"
            f" every class needs two or more (the smallest is {data.classes[counts.argmin()]}); give more images or another share"
        )
    train, val_rows = train_test_split(
        train, test_size=held_out, stratify=labels[train], random_state=split_seed
    )

    images, resident = place(data, location, device)
    label_tensor = data.labels.to(device)

    def rows(which: np.ndarray) -> Images:
        return Images(images, label_tensor, torch.from_numpy(np.sort(which)), resident)

    pretrain = rows(np.concatenate([train, unlabeled]))
    mean, std = channel_statistics(pretrain)
    return DataSet(
        name=name,
        classes=data.classes,
        pretrain=pretrain,
        train=rows(train),
        val=rows(val_rows),
        test=rows(data.test),
        mean=mean.to(device),
        std=std.to(device),
    )


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of the rows (n,) in which the classes take turns, so that any first part is as balanced as it can be."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(labels[shuffled]).groupby(labels[shuffled]).cumcount().to_numpy()
    return shuffled[np.argsort(turn, kind="stable")]


def place(data: Source, location: str, device: torch.device) -> tuple[Tensor, bool]:
    """The images, and whether they are resident: in the device's memory, or left as they are (host memory or a mapped file)."""
    if location == "host":
        return data.images, False
    if device.type == "cpu" and not data.mapped:
        return data.images, True
    give_back = torch.cuda.empty_cache if device.type == "cuda" else memory.give_back
    give_back()  # what earlier runs of this process have left counts as free
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = data.images.numel()
    if location == "auto" and needed > MEMORY_SHARE * free:
        return data.images, False
    if needed > free:
        raise Refused(
            f"dataset.location=device: the images take {needed:,} bytes and {device} has {free:,} free; use auto or host"
        )
    return (data.images.clone() if device.type == "cpu" else data.images.to(device)), True


def channel_statistics(images: Images, most: int = 10_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) in [0, 1] over at most `most` images, evenly spaced."""
    some = images.rows[:: max(1, len(images) // most)]
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for rows in some.split(1000):
        x = images.images[rows.to(images.images.device)].cpu().double() / 255
        count += x.numel() // x.shape[1]
        total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1).float()
