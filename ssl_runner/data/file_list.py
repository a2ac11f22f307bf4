"""A data set as a CSV list of image files: columns path, label and split."""

import csv
import os
from pathlib import Path

import pandas as pd

from ssl_runner.data.layouts import FOLDERS, SPLITS, Listing
from ssl_runner.data.skipped import Skipped, printable
from ssl_runner.errors import UsageError, counted, one_line

COLUMNS = ("path", "label", "split")


def read_list(given: str, labels: bool | None) -> Listing:
    """List the images of a CSV file with a header, in UTF-8.

    Columns: `path`, relative to the folder of the CSV file or absolute; optionally `label`, empty if
    unlabelled; optionally `split`, one of train (also if empty), val, test and unlabeled. Other columns are
    ignored. labels=False ignores `label`; labels=True requires it.

    Spaces around column names, labels and splits are ignored. Rows are ordered by split, then by class, then
    as in the file.

    Raises UsageError for a file that does not have this form, for labels that only val or test has, or if
    there are no images to train on.
    """
    file, given = Path(given).expanduser(), printable(given)
    table = _read_table(file)
    layout = f"list {printable(file.name)}: {', '.join(name for name in COLUMNS if name in table)}"
    label = table.label if "label" in table and labels is not False else pd.Series("", table.index)
    split = _splits(table, given)
    in_train = sorted(label[(split == "train") & (label != "")].unique())
    scored = split.isin(["val", "test"])
    _check_labels(given, in_train, label, scored, labels)

    listing = Listing(layout, Skipped(), classes=[printable(name) for name in in_train])
    base = file.resolve().parent
    if not in_train:
        listing.layout += ", unlabelled"
        for path in table.path[scored]:
            listing.skipped.add("in val or test (no training labels)", base / path)
        table, label, split = table[~scored], label[~scored], split[~scored]
    number = label.where(split != "unlabeled", "").map({name: i for i, name in enumerate(in_train)})
    number = number.fillna(-1).astype(int)
    split = split.where(number >= 0, "unlabeled")
    order = pd.DataFrame({"split": split.map(SPLITS.index), "number": number}).sort_values(
        ["split", "number"], kind="stable"
    )
    if order.empty:
        raise UsageError(
            f"dataset.files={given}: expected at least one row with the split train or unlabeled, found"
            f" {len(scored)} of val or test; add images to train on"
        )
    listing.files = [base / path for path in table.path[order.index]]
    listing.labels = order.number.tolist()
    listing.splits = [SPLITS[i] for i in order.split]
    return listing


def _read_table(file: Path) -> pd.DataFrame:
    """The rows of a CSV file as text, indexed by line. Raises UsageError unless each has one path."""
    key = f"dataset.files={printable(file)}"
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = dict((reader.line_num, row) for row in reader if row)  # noqa: C402
    except (OSError, csv.Error) as error:
        raise UsageError(
            f"{key}: expected a CSV file with a column path ({one_line(error)}); set dataset.files to one"
        ) from error
    meant = {name.lower().removesuffix("s"): name for name in header}
    if near := [meant[name] for name in COLUMNS if name in meant and name not in header]:
        raise UsageError(
            f"{key}: expected the columns {', '.join(COLUMNS)}, found {printable(near[0])}; rename it"
        )
    if header.count("path") != 1 or len(set(header)) < len(header) or not rows:
        raise UsageError(
            f"{key}: expected a header with a column path, and rows, found the columns"
            f" {printable(', '.join(header)) or 'none'} and {counted(len(rows), 'row')}; add them"
        )
    for line, row in rows.items():
        if len(row) != len(header):
            raise UsageError(
                f"{key}: expected {counted(len(header), 'column')} in line {line}, found {len(row)}; put"
                " quotes around a path with a comma"
            )
    cells = [
        [cell if name == "path" else cell.strip() for name, cell in zip(header, row, strict=True)]
        for row in rows.values()
    ]
    table = pd.DataFrame(cells, index=list(rows), columns=header, dtype=object)
    folder = file.resolve().parent
    real = pd.Series([_real(folder / path) for path in table.path], table.index, dtype=object)
    for bad, what in ((table.path == "", "a path in each row"), (real.duplicated(), "each file once")):
        if bad.any():
            raise UsageError(f"{key}: expected {what}, found line {table.index[bad][0]}; correct it")
    return table


def _real(path: Path) -> str:
    """The path without symbolic links, or as it is if it cannot be one."""
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL byte
        return str(path)


def _splits(table: pd.DataFrame, given: str) -> pd.Series:
    """The split of each row. Raises UsageError for an unknown one."""
    if "split" not in table:
        return pd.Series("train", table.index)
    named = table.split.replace("", "train")
    for line, name in named.items():
        if name.lower() not in FOLDERS:
            raise UsageError(
                f"dataset.files={given}: expected train, val, test or unlabeled as split, found"
                f" {printable(name)} in line {line}; correct it"
            )
    return named.str.lower().map(FOLDERS)


def _check_labels(
    given: str, classes: list[str], label: pd.Series, scored: pd.Series, labels: bool | None
) -> None:
    """Raise UsageError if labels are missing, of one class only, or without training images."""
    if len(classes) == 1 or (labels and not classes):
        raise UsageError(
            f"dataset.files={given}: expected at least 2 labels in train, found {len(classes)}; add labels,"
            " or set dataset.labels=false"
        )
    for line, name in label[scored].items() if classes else ():
        if not name:
            raise UsageError(
                f"dataset.files={given}: expected a label in each row of val and test, line {line} has none;"
                " add it, or set its split to unlabeled"
            )
        if name not in classes:
            raise UsageError(
                f"dataset.files={given}: expected in val and test only labels of train, found"
                f" {printable(name)} in line {line}; add training images for it, or remove it"
            )
