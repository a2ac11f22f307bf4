"""Image data sets read by the library `datasets`: from the Hugging Face Hub, or saved to disk. Extra `hf`."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_runner.data import decode
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError, one_line
from ssl_runner.runs.files import atomic_write

BLOCK = 1000  # images decoded before they are written


def hf(
    path: str | None,
    image: str,
    label: str | None,
    train: str,
    test: str | None,
    unlabeled: str | None,
    size: int | None,
    channels: int | None,
    cache: str,
) -> Source:
    """Return a data set of images, with one label each or without labels.

    path             folder written by `save_to_disk`, or what `load_dataset` accepts: a name on the Hub,
                     downloaded to the cache of `datasets`, or a folder of data files
    image, label     names of the columns; without a `label`, `train` is unlabelled, and `test` is not read
    train, test      names of the splits; `test` may be None
    unlabeled        name of a split with more images for pretraining, or None
    size             images are centre-cropped to a square and resized to size x size; None for images that
                     are square and of one size already
    channels         1 or 3, None for 3
    cache            folder for the decoded images, one memory-mapped file

    Raises UsageError if `datasets` is not installed, if the data set, a split or a column is missing, if an
    image cannot be read, or if a label is missing.
    """
    splits = _load(path)
    labelled = {"train": train, "test": test} if label is not None else {}
    wanted = {"train": train} | labelled | {"unlabeled": unlabeled}
    parts = {part: _split(splits, f"dataset.{part}={name}", name) for part, name in wanted.items() if name}
    for part, data in parts.items():
        for key, column in {"image": image, "label": label if part in labelled else None}.items():
            if column is not None and column not in data.column_names:
                raise UsageError(
                    f"dataset.{key}={column}: expected a column of {path} ({wanted[part]}); use one of"
                    f" {', '.join(data.column_names)}"
                )
    classes, labels = _labels([parts[part] for part in parts if part in labelled], label)
    images = _images(list(parts.values()), image, size, channels or 3, cache)
    rows = np.arange(len(images))
    n = len(parts["train"]) if labelled else 0
    labels = np.concatenate([labels, np.full(len(rows) - len(labels), -1)])
    known = int((labels >= 0).sum())
    return Source(
        images, torch.from_numpy(labels), classes, rows[:n], rows[n:known], rows[known:], mapped=True
    )


def _split(splits: dict[str, Any], given: str, name: str) -> Any:
    if name not in splits:
        raise UsageError(f"{given}: expected a split; use one of {', '.join(map(str, splits))}")
    return splits[name]


def _load(path: str | None) -> dict[str, Any]:
    """Return the splits by name. A single split saved by `save_to_disk` has the name "train"."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "dataset=hf: expected the library datasets to be installed; run pip install 'ssl_runner[hf]'"
        ) from error
    if path is None:
        raise UsageError(
            "dataset.name=null: expected a data set of the Hugging Face Hub, such as ylecun/mnist, or a"
            " folder written by save_to_disk; set dataset.name"
        )
    folder = Path(path).expanduser()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"dataset.name={path}: expected a folder written by save_to_disk, or a name on the Hugging Face"
            f" Hub that is in its cache or can be downloaded ({one_line(error)}); set dataset.name to one"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _labels(splits: list[Any], column: str | None) -> tuple[list[str], np.ndarray]:
    """Return class names and the labels (n,) int64 of all splits, one after another.

    A `ClassLabel` has names and numbers. Of other columns, the sorted values in the first split are the
    classes. Returns no names and no labels for no splits.
    """
    import datasets

    if not splits:
        return [], np.empty(0, dtype=np.int64)

    feature = splits[0].features[column]
    names = getattr(feature, "names", None)
    if any(getattr(split.features[column], "names", None) != names for split in splits):
        raise UsageError(
            f"dataset.label={column}: expected the same classes in each split; cast one split to the features"
            " of the other"
        )
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise UsageError(
            f"dataset.label={column}: expected one value for each image; use a column of classes"
        )
    values = [value for split in splits for value in split[column]]
    classes = sorted({value for value in splits[0][column] if value is not None}) if names is None else names
    number = {value: row for row, value in enumerate(classes if names is None else range(len(names)))}
    if odd := [value for value in values if value not in number]:
        raise UsageError(
            f"dataset.label={column}: expected one of {len(classes)} classes for each image, found {odd[0]}"
            f" ({len(odd)} such images); set dataset.label, or use splits with labels"
        )
    return [str(value) for value in classes], np.array([number[value] for value in values], dtype=np.int64)


def _images(splits: list[Any], column: str, size: int | None, channels: int, cache: str) -> Tensor:
    """Return the images of all splits, (n, channels, side, side) uint8, from one memory-mapped file.

    The file is reused while the fingerprints of the splits and the settings are the same.
    """
    key = f"{decode.VERSION} {size} {channels} {column} {[split._fingerprint for split in splits]}"
    decoded = Path(cache).expanduser() / f"hf-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        decoded.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"dataset.cache={cache}: expected a writable folder ({error.strerror}); set another one"
        ) from error
    if not decoded.is_file():
        _write(splits, column, size, channels, decoded)
    return torch.from_numpy(np.load(decoded, mmap_mode="c"))


def _write(splits: list[Any], column: str, size: int | None, channels: int, target: Path) -> None:
    """Decode the images in parallel into `target`, one .npy array (n, channels, side, side) uint8."""
    n, shape = sum(map(len, splits)), None
    with (
        tqdm(desc="decode", total=n, unit="images", unit_scale=True, disable=None) as bar,
        atomic_write(target, concurrent=True) as array,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for block in _blocks(splits, column):
            for image in threads.map(lambda encoded: _decode(encoded, column, size, channels), block):
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
                    np.lib.format.write_array_header_1_0(array, header)
                if image.shape != shape or shape[1] != shape[2]:
                    raise UsageError(
                        f"dataset.size=null: expected square images of one size, found {image.shape[2]} x"
                        f" {image.shape[1]} pixels; set dataset.size=<side in pixels> to crop and resize all"
                    )
                array.write(image.tobytes())
                bar.update()


def _blocks(splits: list[Any], column: str) -> Iterator[list[Any]]:
    """Yield the encoded images of all splits, up to 1,000 at once."""
    import datasets

    for split in splits:
        if not isinstance(split.features[column], datasets.Image):
            raise UsageError(
                f"dataset.image={column}: expected a column of images, found {split.features[column]};"
                " set dataset.image"
            )
        encoded = split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for rows in encoded.iter(BLOCK):
            yield rows[column]


def _decode(encoded: dict[str, Any], column: str, size: int | None, channels: int) -> np.ndarray:
    """{"bytes", "path"} of an image -> (channels, H, W) uint8."""
    name = (encoded or {}).get("path") or f"an image of dataset.image={column}"
    try:
        data = encoded["bytes"]
        with Image.open(BytesIO(data) if data is not None else encoded["path"]) as image:
            return decode.pixels(image, size, channels)
    except decode.DAMAGED as error:
        raise UsageError(f"{name}: expected a readable image ({one_line(error)}); repair it") from error
