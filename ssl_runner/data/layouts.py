"""Layouts of image folders: which files there are, with the label and the split of each."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ssl_runner.data.skipped import Skipped, printable
from ssl_runner.errors import UsageError

SPLITS = ("train", "test", "val", "unlabeled")  # the order of the images
FOLDERS = {  # name of a folder, in lower case -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
# formats that Pillow registers but that are not training images
DOCUMENTS = {"EPS", "HDF5", "MPEG", "GRIB", "BUFR", "FITS", "WMF", "PSD"}
# endings of images that Pillow reads only with a plugin, or not at all
NO_CODEC = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}


@dataclass
class Listing:
    """The image files of a data set, in the order of its rows.

    labels: positions in `classes`, -1 for unlabelled; splits: names in SPLITS; layout: in words.
    """

    layout: str
    skipped: Skipped
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def add(self, files: Sequence[Path], label: int, split: str) -> None:
        self.files += files
        self.labels += [label] * len(files)
        self.splits += [split] * len(files)


@dataclass
class Tree:
    """The images below a folder: those directly in it, and those in and below each sub-folder."""

    path: Path
    direct: list[Path]
    below: dict[str, list[Path]]

    @property
    def split(self) -> str | None:
        """The split that the folder is named after, in upper or lower case."""
        return FOLDERS.get(self.path.name.lower())

    @property
    def files(self) -> list[Path]:
        return [*self.direct, *(file for files in self.below.values() for file in files)]


@dataclass
class Root:
    """The images of one root: split -> class -> files. The class is None for unlabelled images.

    train: folder of the class folders.
    """

    layout: str
    train: Path
    splits: dict[str, dict[str | None, list[Path]]]
    hint: str = ""


def read_layout(roots: Sequence[Path], labels: bool | None, skip_unreadable: bool) -> Listing:
    """List the images of one or more folders with the same layout.

    labels: whether sub-folders are classes, None to decide by looking. Symbolic links are followed. Files of
    several roots are joined split by split and class by class.

    Raises UsageError if the roots differ in their layout, if there are no images, if a class has no training
    image, or if a folder cannot be read, unless `skip_unreadable`.
    """
    finder = Finder(skip_unreadable)
    found = [finder.root(root, labels) for root in roots]
    for root, one in zip(roots, found, strict=True):
        if one.layout != found[0].layout:
            raise UsageError(
                f"dataset.root={printable(root)}: expected the layout of {printable(roots[0])},"
                f" {found[0].layout}, found {one.layout}; use roots with the same layout"
            )
    names = sorted({name for one in found for part in one.splits.values() for name in part if name})
    _check_classes(roots, found, names, finder.skipped)
    roots_text = f", {len(roots)} roots" if len(roots) > 1 else ""
    layout = found[0].layout + roots_text + next((one.hint for one in found if one.hint), "")
    listing = Listing(layout, finder.skipped, classes=[printable(name) for name in names])
    for split in SPLITS:
        for label, name in [*enumerate(names), (-1, None)]:
            for one in found:
                listing.add(one.splits.get(split, {}).get(name, []), label, split)
    if not listing.files:
        raise UsageError(
            f"dataset.root={', '.join(map(printable, roots))}: expected image files (.jpg, .png, .webp, ...),"
            f" found none{_of(finder.skipped)}; set dataset.root to another folder"
        )
    return listing


def _of(skipped: Skipped) -> str:
    return f" ({skipped})" if str(skipped) else ""


def _check_classes(
    roots: Sequence[Path], found: Sequence[Root], names: Sequence[str], skipped: Skipped
) -> None:
    """Raise UsageError for a class without training images."""
    if not names:
        return
    in_train = {name for one in found for name, files in one.splits["train"].items() if files}
    where = printable(found[0].train)
    if empty := [
        printable(name)
        for name in names
        if any(name in one.splits["train"] for one in found) and name not in in_train
    ]:
        raise UsageError(
            f"{where}/{empty[0]}: expected image files (.jpg, .png, .webp, ...), found none{_of(skipped)};"
            " add some or remove the folder"
        )
    if odd := [printable(name) for name in names if name not in in_train]:
        raise UsageError(
            f"dataset.root={printable(roots[0])}: expected in test and val only classes of train; add"
            f" training images for or remove {', '.join(odd)}"
        )


def _check_number(folder: Path, classes: int) -> None:
    """Raise UsageError for less than two class folders."""
    if classes < 2:
        raise UsageError(
            f"{printable(folder)}: expected at least 2 class folders, found {classes}; add one folder of"
            " image files per class, or set dataset.labels=false"
        )


class Finder:
    """Reads folders, and counts the files that it skips."""

    def __init__(self, skip_unreadable: bool):
        self.skip_unreadable, self.skipped = skip_unreadable, Skipped()
        readable = Image.registered_extensions().items()
        self.endings = {end for end, kind in readable if kind in Image.OPEN and kind not in DOCUMENTS}

    def root(self, root: Path, labels: bool | None) -> Root:
        """Find the layout of a root, and its files."""
        direct, folders = self.entries(root)
        real = Path(os.path.realpath(root))
        above = {str(real), *map(str, real.parents)}
        trees = [tree for folder in folders if (tree := self.tree(folder, above))]
        parts = [tree for tree in trees if tree.split]
        others = [tree for tree in trees if not tree.split]
        train = next((tree for tree in parts if tree.split == "train"), None)
        unsplit = bool(direct) or any(tree.files for tree in others)
        if train is not None and (len(train.below) > 1 or not unsplit):
            self.leave_out("outside of the splits", direct)
            for tree in others:
                self.leave_out("outside of the splits", tree.files)
            return self.with_splits(root, train, parts, labels)
        if labels is not False and not unsplit and any(tree.split != "unlabeled" for tree in parts):
            raise UsageError(
                f"dataset.root={printable(root)}: expected train beside {parts[0].path.name}, but train is"
                " missing; add it, or set dataset.root to another folder"
            )
        return self.without_splits(root, direct, trees, labels)

    def with_splits(self, root: Path, train: Tree, parts: Sequence[Tree], labels: bool | None) -> Root:
        """root/train, and what there is of test, val and unlabeled beside it."""
        labelled = labels if labels is not None else len(train.below) > 1
        if labelled:
            _check_number(train.path, len(train.below))
        splits: dict[str, dict[str | None, list[Path]]] = {"train": {}}
        for tree in parts:
            split = tree.split or ""
            files = splits.setdefault(split, {})
            if split == "unlabeled" or (split == "train" and not labelled):
                splits.setdefault("unlabeled", {}).setdefault(None, []).extend(tree.files)
            elif labelled:
                self.leave_out(f"directly in {tree.path.name}/", tree.direct)
                for name, below in tree.below.items():
                    files.setdefault(name, []).extend(below)
            else:
                self.leave_out(f"in {tree.path.name}/ (no training labels)", tree.files)
        kept = [name for name in ("test", "val", "unlabeled") if any(splits.get(name, {}).values())]
        if not labelled:
            return Root("train/**, unlabelled", train.path, splits)
        return Root(", ".join(["train/<class>/**", *kept]), train.path, splits)

    def without_splits(
        self, root: Path, direct: list[Path], trees: Sequence[Tree], labels: bool | None
    ) -> Root:
        """root/<class>/**, or root/** without labels."""
        files = [*direct, *(file for tree in trees for file in tree.files)]
        depths = {len(file.relative_to(root).parts) for file in files}
        filled = sum(bool(tree.files) for tree in trees)
        labelled = labels if labels is not None else filled > 1 and len(depths) == 1
        if not labelled:
            hint = (
                " (dataset.labels=true takes sub-folders as classes)" if labels is None and filled > 1 else ""
            )
            return Root("**, unlabelled", root, {"unlabeled": {None: sorted(files)}}, hint)
        _check_number(root, len(trees))
        self.leave_out("outside of class folders", direct)
        return Root("<class>/**", root, {"train": {tree.path.name: sorted(tree.files) for tree in trees}})

    def leave_out(self, kind: str, files: Sequence[Path]) -> None:
        for file in files:
            self.skipped.add(kind, file)

    def tree(self, folder: Path, above: set[str]) -> Tree | None:
        """The images below a folder, None for a link to one of the folders `above` it (real paths)."""
        real = os.path.realpath(folder)
        if real in above:
            self.skipped.add("linked again", folder)
            return None
        direct, folders = self.entries(folder)
        return Tree(folder, direct, {sub.name: sorted(self.below(sub, {*above, real})) for sub in folders})

    def below(self, folder: Path, seen: set[str]) -> Iterator[Path]:
        """The images in and below a folder. `seen`: real paths of the folders read so far, to end loops."""
        real = os.path.realpath(folder)
        if real in seen:
            self.skipped.add("linked again", folder)
            return
        seen.add(real)
        direct, folders = self.entries(folder)
        yield from direct
        for sub in folders:
            yield from self.below(sub, seen)

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The images and the folders directly in a folder, sorted by name. Counts all else as skipped."""
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            if not self.skip_unreadable:
                raise UsageError(
                    f"{printable(folder)}: expected a readable folder ({error.strerror}); repair or remove it"
                    ", or set dataset.on_error=skip"
                ) from error
            self.skipped.add("unreadable", folder)
            return [], []
        images, folders = [], []
        for path in inside:
            if path.name.startswith("."):
                self.skipped.add("hidden", path)
            elif path.is_dir():
                folders.append(path)
            elif kind := self.kind_to_skip(path):
                self.skipped.add(kind, path)
            else:
                images.append(path)
        return images, folders

    def kind_to_skip(self, path: Path) -> str:
        """Why a file is not read, "" for an image."""
        ending = path.suffix.lower()
        if ending in self.endings:
            return "not a regular file" if path.exists() and not path.is_file() else ""
        if ending in NO_CODEC:
            return f"{ending} (no codec)"
        known = re.fullmatch(r"\.(?=.*[a-z])[a-z0-9]{1,5}", ending)
        return ending if known else "with another ending" if ending else "without ending"
