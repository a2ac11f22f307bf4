"""Image data sets read by the library `datasets`: from the Hugging Face Hub, or saved to disk. Extra `hf`."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ssl_runner.data import decode
from ssl_runner.data.dataset import Source
from ssl_runner.data.decoded import decode_images
from ssl_runner.errors import UsageError, counted, one_line


class Splits(TypedDict):
    """Names of the splits that are used as training, test and unlabelled images, None for no such images."""

    train: str
    test: str | None
    unlabeled: str | None


def hf(
    path: str | None,
    image: str,
    label: str | None,
    size: int | None,
    channels: int | None,
    cache: str,
    **splits: Unpack[Splits],
) -> Source:
    """Return a data set of images, with one label each or without labels.

    path             folder written by `save_to_disk`, or what `load_dataset` accepts: a name on the Hub,
                     downloaded to the cache of `datasets`, or a folder of data files
    image, label     names of the columns; without a `label`, `train` is unlabelled, and `test` is not read
    size             images are centre-cropped to a square and resized to size x size; None for images that
                     are square and of one size already
    channels         1 or 3, None for 3
    cache            folder of the decoded images (`decode_images`)
    splits           train, test, unlabeled: names of the splits; the last two may be None

    Raises UsageError if `datasets` is not installed, if the data set, a split or a column is missing, if an
    image cannot be read, or if a label is missing.
    """
    labelled = ("train", "test") if label is not None else ()
    test = splits["test"] if labelled else None
    wanted = {"train": splits["train"], "test": test, "unlabeled": splits["unlabeled"]}
    found = _load(path)
    parts = {part: _split(found, f"dataset.{part}={name}", name) for part, name in wanted.items() if name}
    for part, data in parts.items():
        for key, column in {"image": image, "label": label if part in labelled else None}.items():
            if column is not None and column not in data.column_names:
                raise UsageError(
                    f"dataset.{key}={column}: expected a column of {path} ({wanted[part]}); use one of"
                    f" {', '.join(data.column_names)}"
                )
    classes, labels = _labels([parts[part] for part in parts if part in labelled], label)
    named = [(str(wanted[part]), data) for part, data in parts.items()]
    images = _images(named, image, size, channels or 3, cache)
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
            f"dataset.label={column}: expected one of {counted(len(classes), 'class', 'classes')} for each"
            f" image, found {odd[0]} ({counted(len(odd), 'such image')});"
            " set dataset.label, or use splits with labels"
        )
    return [str(value) for value in classes], np.array([number[value] for value in values], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a split, in a `datasets.Image` column that is not decoded."""

    split_name: str
    split: Any
    column: str
    row: int

    def __str__(self) -> str:
        place = f"image {self.row} of split {self.split_name} (dataset.image={self.column})"
        return self._encoded().get("path") or place

    @property
    def name(self) -> str:
        return str(self)

    def open(self) -> Image.Image:
        encoded = self._encoded()
        if not any(encoded.values()):
            raise ValueError("no image")
        if encoded["bytes"] is None:
            return Image.open(encoded["path"])
        try:
            return Image.open(BytesIO(encoded["bytes"]))
        except UnidentifiedImageError:  # its message is the address of the buffer
            raise ValueError("not an image of a format that Pillow reads") from None

    def _encoded(self) -> dict[str, Any]:
        """{"bytes", "path"}, {} for a missing image."""
        return self.split[self.row][self.column] or {}


def _images(
    splits: list[tuple[str, Any]], column: str, size: int | None, channels: int, cache: str
) -> Tensor:
    """Return the images of all splits, (n, channels, side, side) uint8, from one memory-mapped file.

    splits: pairs of name and split. The file is reused while their fingerprints and the settings are the
    same.
    """
    import datasets

    key = f"{decode.VERSION} {size} {channels} {column} {[split._fingerprint for _, split in splits]}"
    rows: list[Row] = []
    for name, split in splits:
        if not isinstance(split.features[column], datasets.Image):
            raise UsageError(
                f"dataset.image={column}: expected a column of images, found {split.features[column]};"
                " set dataset.image"
            )
        encoded = split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        rows += [Row(name, encoded, column, row) for row in range(len(encoded))]
    target = f"hf-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    repair = "repair it, and save the data set again"
    return decode_images(rows, target, size, cache, channels, skip_broken=False, repair=repair)[0]
