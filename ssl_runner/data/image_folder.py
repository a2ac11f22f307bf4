"""Images of your own, from folders or a list of files, decoded once into a memory-mapped file."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_runner.data.contents import listed
from ssl_runner.data.dataset import Source
from ssl_runner.data.decoded import decode_files, is_missing, none_readable
from ssl_runner.data.file_list import read_list
from ssl_runner.data.layouts import Listing, read_layout
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.names import ON_ERROR


def folder(
    root: str | Sequence[str] | None,
    size: int | None,
    cache: str,
    files: str | None = None,
    labels: bool | None = None,
    on_error: str = "refuse",
    channels: int | None = None,
) -> Source:
    """Return image files of any format Pillow reads, from one or more folders or from a list.

    root       folder, or folders with the same layout (`layouts.read_layout`)
    size       with `size`, images are centre-cropped to a square and resized to size x size; without it they
               must be square and have the same size
    cache      folder of the decoded images (`decode_files`)
    files      instead of root: a CSV list (`file_list.read_list`)
    labels     whether sub-folders are classes, None to decide by looking
    on_error   "refuse" or "skip" files that cannot be read
    channels   3 for RGB, 1 for luma, None for 3

    Raises UsageError if the layout is unknown, if an image cannot be read, if the sizes differ, or if `cache`
    is not writable.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f"dataset.on_error={on_error}: expected {' or '.join(ON_ERROR)}; use one of them")
    skip = on_error == "skip"
    if files is not None:
        if root is not None:
            raise UsageError(
                f"dataset.files={printable(files)}: expected dataset.root=null, or no list; set one of them"
            )
        listing, base = read_list(files, labels), Path(files).expanduser().resolve().parent
    else:
        roots = _roots(root)
        listing, base = read_layout(roots, labels, skip), Path(os.path.commonpath(roots))
    images, broken = decode_files(listing.files, size, cache, channels or 3, skip)
    for row, error in broken.items():
        listing.skipped.add("unreadable" if is_missing(error) else "broken", listing.files[row])
    return replace(_source(listing, images, broken), **listed(listing.files, base))


def _roots(root: str | Sequence[str] | None) -> list[Path]:
    """The folders of dataset.root. Raises UsageError unless they exist, and none lies in another."""
    paths = [Path(one).expanduser() for one in ([root] if isinstance(root, str) else root or [])]
    if not paths or not all(path.is_dir() for path in paths):
        given = next((printable(path) for path in paths if not path.is_dir()), "null")
        raise UsageError(
            f"dataset.root={given}: expected a folder of images, such as <class>/* or train/<class>/*; set"
            " dataset.root to one, or dataset.files to a list"
        )
    roots = [path.resolve() for path in paths]
    for one, other in permutations(roots, 2):
        if one.is_relative_to(other):
            raise UsageError(
                f"dataset.root={printable(one)}: expected each folder once, but its images are also those of"
                f" {printable(other)}; leave one out"
            )
    return roots


def _source(listing: Listing, images: Tensor, broken: Iterable[int]) -> Source:
    """The splits of a listing without its broken files. Raises UsageError if a class has lost all images."""
    labels, splits = np.array(listing.labels), np.array(listing.splits)
    splits[list(broken)] = "broken"
    rows = {split: np.flatnonzero(splits == split) for split in ("train", "val", "test", "unlabeled")}
    sizes = np.bincount(labels[rows["train"]], minlength=len(listing.classes))
    if empty := [name for name, n in zip(listing.classes, sizes, strict=True) if not n]:
        raise UsageError(
            f"dataset.on_error=skip: expected a readable training image in each class, found none in"
            f" {', '.join(empty)}; repair some or remove the class"
        )
    if not len(rows["train"]) + len(rows["unlabeled"]):
        raise none_readable()
    return Source(
        images,
        torch.from_numpy(labels).long(),
        listing.classes,
        rows["train"],
        rows["test"],
        rows["unlabeled"],
        mapped=True,
        val=rows["val"] if len(rows["val"]) else None,
        layout=listing.layout,
        skipped=listing.skipped,
    )
