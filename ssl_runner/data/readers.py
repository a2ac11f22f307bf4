"""Data set readers: MNIST digits from the package, CIFAR and STL-10 from torchvision.

Every reader takes `size`, pixels per side, and `channels`, 1 or 3. None keeps those of the published images.
See ssl_runner.data.resize.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from ssl_runner.data.dataset import Source
from ssl_runner.data.resize import resized
from ssl_runner.data.splits import balanced_order
from ssl_runner.errors import UsageError, one_line

NONE = np.empty(0, dtype=np.int64)


def mnist5k(size: int | None = None, channels: int | None = None) -> Source:
    """Return 5,000 MNIST digits, 28 x 28: 4,000 training images and a fixed set of 1,000 test images.

    All 10 classes have equal size. The digits are read from mnist5k.npz beside this file; mnist5k.md states
    their source and licence.
    """
    with np.load(Path(__file__).with_name("mnist5k.npz")) as digits:
        images, labels = digits["images"], digits["labels"].astype(np.int64)
    order = balanced_order(labels, seed=0)
    digits5k = Source(
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels),
        classes=[str(digit) for digit in range(10)],
        train=order[1000:],
        test=order[:1000],
        unlabeled=NONE,
    )
    return resized(digits5k, size, channels)


def cifar10(root: str | None, size: int | None = None, channels: int | None = None) -> Source:
    """Return CIFAR-10: 50,000 training and 10,000 test images, 32 x 32. Downloaded to `root` if missing."""
    return resized(_cifar(torchvision.datasets.CIFAR10, root), size, channels)


def cifar100(root: str | None, size: int | None = None, channels: int | None = None) -> Source:
    """Return CIFAR-100: 50,000 training and 10,000 test images, 32 x 32. Downloaded to `root` if missing."""
    return resized(_cifar(torchvision.datasets.CIFAR100, root), size, channels)


def _cifar(data_set: type, root: str | None) -> Source:
    parts = [_torchvision(data_set, root, train=train) for train in (True, False)]
    n = len(parts[0].data)
    return Source(
        images=torch.from_numpy(np.concatenate([part.data for part in parts]))
        .permute(0, 3, 1, 2)
        .contiguous(),
        labels=torch.tensor([label for part in parts for label in part.targets]),
        classes=list(parts[0].classes),
        train=np.arange(n),
        test=np.arange(n, n + len(parts[1].data)),
        unlabeled=NONE,
    )


def stl10(root: str | None, size: int | None = None, channels: int | None = None) -> Source:
    """Return STL-10: 5,000 training, 8,000 test and 100,000 unlabelled images, 96 x 96.

    Downloaded to `root` if missing.
    """
    parts = [
        _torchvision(torchvision.datasets.STL10, root, split=split)
        for split in ("train", "test", "unlabeled")
    ]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
    train, test, unlabeled = np.split(
        np.arange(len(labels)), np.cumsum([len(part.data) for part in parts[:2]])
    )
    images = torch.empty(len(labels), 3, 96, 96, dtype=torch.uint8)
    for part, indices in zip(parts, (train, test, unlabeled), strict=True):
        images[indices[0] : indices[-1] + 1] = torch.from_numpy(part.data)
        part.data = None  # free this copy: 2.8 GB for the unlabelled images
    data = Source(images, torch.from_numpy(labels), list(parts[0].classes), train, test, unlabeled)
    return resized(data, size, channels)


def _torchvision(data_set: Any, root: str | None, **split: object) -> torchvision.datasets.VisionDataset:
    """Return one split of a torchvision data set, which verifies its files and downloads missing ones.

    The network is not used if the files are complete. They may lie in `root`, in one of its folders, or
    `root` may be the data set's own folder, such as cifar-10-batches-py.

    Raises UsageError if `root` is None, or if the data are missing or corrupt and the download fails.
    """
    if root is None:
        raise UsageError(
            f"dataset.root=null: expected the folder that contains {data_set.__name__}, or a download target;"
            " set dataset.root"
        )
    folder = _parent_of(data_set.base_folder, Path(root).expanduser())
    try:
        return data_set(folder, download=True, **split)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        archive = getattr(data_set, "filename", "its archive")
        reason = one_line(error)
        raise UsageError(
            f"dataset.root={folder}: expected a complete copy of {data_set.__name__}, and the download"
            f" failed ({reason}); put {archive} ({getattr(data_set, 'url', 'see torchvision')}) there,"
            " or set dataset.root to a folder that contains it"
        ) from error


def _parent_of(name: str, root: Path) -> Path:
    """Return the folder that holds the folder `name`: the parent of `root`, `root`, or a folder in `root`.

    Returns `root`, the download target, if there is none.
    """
    if root.name == name and root.is_dir():
        return root.parent
    if (root / name).is_dir() or not root.is_dir():
        return root
    return next((found.parent for found in sorted(root.glob(f"*/{name}")) if found.is_dir()), root)
