"""Data sets as two tensors, images (n, C, H, W) uint8 and labels (n,) int64, and seeded splits of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from ssl_runner.data.contents import digest
from ssl_runner.data.eval_transform import EvalTransform
from ssl_runner.data.images import Images
from ssl_runner.data.skipped import Skipped
from ssl_runner.data.splits import balanced_order, hold_out, nearest_fraction, smallest_subset
from ssl_runner.device import release_freed_memory
from ssl_runner.errors import UsageError, counted
from ssl_runner.numerics import usual_defaults

MEMORY_FRACTION = 0.5  # storage="auto": largest fraction of the free device memory that images may use


@dataclass
class Source:
    """All images of a data set, and the indices of each split, as returned by its reader.

    images (n, C, H, W) uint8; labels (n,) int64, -1 if unlabelled; classes: class names, empty if all images
    are unlabelled; train, test and unlabeled: indices of images; val: the same, None to hold out some of
    `train`; layout: how the files are arranged, in words; skipped: files that were not read; files and
    file_bytes (n,): name and length of the file of each image (`contents.listed`), None without such files;
    tensor_resize: whether `resize.resize` has resized the images, and not Pillow.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    train: np.ndarray
    test: np.ndarray
    unlabeled: np.ndarray
    mapped: bool = False  # True if `images` is a memory-mapped file, read page by page on access
    val: np.ndarray | None = None
    layout: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    files: list[str] | None = None
    file_bytes: np.ndarray | None = None
    tensor_resize: bool = False


@dataclass
class DataSet:
    """The splits of one data set. Without labels, `classes`, `train`, `val` and `test` are empty.

    pretrain   `train` and all unlabelled images
    train      labelled training images without `val`
    val        held out from the training images; selects hyperparameters and joins the training set only for
               the final probe fit
    test       evaluated once; empty if the data set has no test images
    layout     how its files are arranged, in words; skipped: files that were not read
    files      name of the file of each image of the reader, None without such files
    digest     16 hexadecimal digits that change with the images or labels of the reader (`contents.digest`)
    mean, std  (C,) per-channel statistics of the pretraining images, with pixels in [0, 1]
    transform  evaluation transform of `train`, `val` and `test`, None for the images as they are stored;
               views are cut from the stored images and have the size of the evaluation images
    tensor_resize  whether `resize.resize` has resized the stored images, and not Pillow
    """

    name: str
    classes: list[str]
    pretrain: Images
    train: Images
    val: Images
    test: Images
    mean: Tensor
    std: Tensor
    layout: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    files: list[str] | None = None
    digest: str = ""
    transform: EvalTransform | None = None
    tensor_resize: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each split."""
        return {split: len(getattr(self, split)) for split in ("pretrain", "train", "val", "test")}

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def stored_size(self) -> int:
        """Side of the stored images, which views are cut from, in pixels."""
        return self.train.images.shape[2]

    @property
    def image_size(self) -> int:
        """Side of the images that the networks are evaluated on, in pixels."""
        return self.stored_size if self.transform is None else self.transform.side(self.stored_size)

    @property
    def view_size(self) -> int | None:
        """Side of the views in pixels, None for that of the stored images."""
        return None if self.transform is None else self.image_size

    def evaluation(self, split: str) -> Images:
        """A split with the evaluation transform, which `pretrain` does not have for training."""
        return replace(getattr(self, split), transform=self.transform)

    def with_transform(self, resize: int | None, crop: int | None) -> "DataSet":
        """The data set with `EvalTransform(resize, crop)`; itself if both are None.

        Raises UsageError for a crop that is larger than the images.
        """
        if resize is None and crop is None:
            return self
        side = resize or min(self.train.images.shape[2:])
        if crop is not None and crop > side:
            raise UsageError(
                f"dataset.eval_crop={crop}: expected at most {side}, the shorter side of the images"
                f" of {self.name} after dataset.eval_resize; use a smaller crop"
            )
        data = replace(self, transform=EvalTransform(resize, crop))
        train, val, test = (data.evaluation(split) for split in ("train", "val", "test"))
        return replace(data, train=train, val=val, test=test)


class Nearest(int):
    """A number of images, for which the nearest number that a data set allows is taken."""


@usual_defaults()
def load(
    source: Callable[[], Source],
    name: str,
    val_fraction: float,
    subset: int | None,
    split_seed: int,
    storage: str,
    device: torch.device,
    test_fraction: float = 0.0,
) -> DataSet:
    """Read a data set, subsample its training images, hold out the validation split and store the images.

    source         reader that returns all images
    name           of the data set, for error messages and reports
    val_fraction   fraction of the training images to hold out, stratified by class; not used for a data set
                   with a validation split
    subset         number of training images to keep, class-balanced, or None for all; also the largest number
                   of unlabelled images to keep. For a Nearest, as many as there are, or as the splits need
    split_seed     seed of the subset and of the splits
    storage        where to store the images: "device", "host", or "auto" for the device if they use at most
                   half of its free memory
    device         on which labels and statistics, and images in device memory, are stored
    test_fraction  fraction of the training images that become the test split, stratified by class, before
                   `subset`

    A data set with one training image in each class is used as unlabelled.

    Raises UsageError if a label has no class, if `subset` is out of range, if no validation or test image can
    be held out, if `test_fraction` is set for a data set with a test split, or if `storage` is "device" and
    the images do not fit.
    """
    data = _without_single_images(_checked(source(), name))
    train, test, unlabeled = data.train, data.test, data.unlabeled
    labels = data.labels.numpy()
    if test_fraction:
        train, test = _split_test(data, name, test_fraction, split_seed)
    if subset is not None:
        trained, what = (train, "training") if data.classes else (unlabeled, "unlabelled")
        least = max(1, len(data.classes))
        if isinstance(subset, Nearest):
            enough = smallest_subset(least, val_fraction) if data.classes and data.val is None else least
            subset = min(max(subset, enough), len(trained))
        if not least <= subset <= len(trained):
            raise UsageError(
                f"dataset.subset={subset}: expected an integer from {least} to {len(trained)}, the"
                f" numbers of classes and {what} images of {name}; use null for all images"
            )
        train = train[balanced_order(labels[train], split_seed)[:subset]]
        unlabeled = np.random.default_rng(split_seed).permutation(unlabeled)[:subset]
    val = data.val if data.val is not None else unlabeled[:0]
    if data.val is None and data.classes:
        train, val = _held_out("dataset.val_fraction", val_fraction, data, train, split_seed)

    images, resident = store_images(data, storage, device)
    label_tensor = data.labels.to(device)

    def split(indices: np.ndarray) -> Images:
        return Images(images, label_tensor, torch.from_numpy(np.sort(indices)), resident)

    pretrain = split(np.concatenate([train, unlabeled]))
    splits = (data.train, data.val, data.test, data.unlabeled)
    mean, std = channel_statistics(pretrain)
    return DataSet(
        name=name,
        classes=data.classes,
        pretrain=pretrain,
        train=split(train),
        val=split(val),
        test=split(test),
        mean=mean.to(device),
        std=std.to(device),
        layout=data.layout,
        skipped=data.skipped,
        files=data.files,
        tensor_resize=data.tensor_resize,
        digest=digest(data.classes, data.files, labels, *splits, data.file_bytes),
    )


def _without_single_images(data: Source) -> Source:
    """The data set, without labels if each class has one training image, since these allow no split."""
    if data.val is not None or not data.classes or torch.bincount(data.labels[data.train]).max() > 1:
        return data
    none, unused = data.train[:0], f", {len(data.test)} test images unused" if len(data.test) else ""
    layout = f"{data.layout}, one image in each class: unlabelled{unused}".lstrip(", ")
    trained, labels = np.concatenate([data.train, data.unlabeled]), torch.full_like(data.labels, -1)
    return replace(data, labels=labels, classes=[], train=none, test=none, unlabeled=trained, layout=layout)


def _checked(data: Source, name: str) -> Source:
    """The data. Raises UsageError for labels outside -1 to classes - 1: no later code can, without a sync."""
    low, high = (int(x) for x in data.labels.aminmax()) if len(data.labels) else (-1, -1)
    if low < -1 or high >= len(data.classes):
        raise UsageError(
            f"{name}: expected labels from -1 (unlabelled) to {len(data.classes) - 1}, the positions"
            f" in `classes`, found {low} to {high}; name every class, or renumber the labels"
        )
    return data


def _split_test(data: Source, name: str, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training images without, and the images of, a test split. Raises UsageError if it has no use."""
    if len(data.test) or not data.classes:
        has = f"{len(data.test)} test images" if len(data.test) else "no labels"
        raise UsageError(f"dataset.test_fraction={fraction}: expected 0, since {name} has {has}; set it to 0")
    return _held_out("dataset.test_fraction", fraction, data, data.train, seed)


def _held_out(
    key: str, fraction: float, data: Source, rows: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`hold_out`. Raises UsageError, which names the option `key`, if it holds nothing out."""
    labels = data.labels.numpy()
    if (parts := hold_out(rows, labels, fraction, seed)) is None:
        sizes, n = np.bincount(labels[rows], minlength=len(data.classes)), len(rows)
        cause = f"of {counted(n, 'training image')} in {counted(len(data.classes), 'class', 'classes')}"
        if (usable := nearest_fraction(sizes, fraction)) is not None:
            found = "held out" if usable > fraction else "left in some classes"
            raise UsageError(f"{key}={fraction}: {cause} none would be {found}; use {key}={usable}")
        subset = f"dataset.subset={smallest_subset(len(data.classes), fraction)}"
        remedy = f"use {subset}" if n < len(data.train) else "use more images"
        raise UsageError(f"{key}={fraction}: {cause} none can be held out: each class has one; {remedy}")
    return parts


def store_images(data: Source, storage: str, device: torch.device) -> tuple[Tensor, bool]:
    """Move the images to device memory, or leave them in host memory or in their memory-mapped file.

    `storage` is "device", "host" or "auto", as in `load`. Returns the images and whether they are resident,
    that is, in device memory. Raises UsageError if `storage` is "device" and the images do not fit.
    """
    if storage == "host":
        return data.images, False
    if device.type == "cpu" and not data.mapped:
        return data.images, True
    release = torch.cuda.empty_cache if device.type == "cuda" else release_freed_memory
    release()  # count memory cached by earlier runs of this process as free
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = data.images.numel()
    if storage == "auto" and needed > MEMORY_FRACTION * free:
        return data.images, False
    if needed > free:
        raise UsageError(
            f"dataset.storage=device: expected {needed:,} bytes of free memory for the images on {device},"
            f" found {free:,}; use auto or host"
        )
    return (data.images.clone() if device.type == "cpu" else data.images.to(device)), True


def channel_statistics(images: Images, most: int = 10_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) per channel, with pixels in [0, 1].

    Computed over every k-th image, with k = max(1, n // most). A standard deviation of 0 is replaced by 1.
    """
    sample = images.indices[:: max(1, len(images) // most)]
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for indices in sample.split(1000):
        x = images.images[indices.to(images.images.device)].cpu().double() / 255
        count += x.numel() // x.shape[1]
        total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1).float()
