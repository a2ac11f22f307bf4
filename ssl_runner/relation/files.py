"""Files that define a relation: pairs of images, and labels of images."""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from ssl_runner.errors import counted


def read_pairs(path: Path) -> tuple[Tensor, Tensor]:
    """Read i and j, (E,) int64 each, from the two columns of a CSV or from the arrays i and j of an npz.

    Raises ValueError if a CSV has no header or other than two columns, and if the indices are not integers.
    Errors of pandas and NumPy for a malformed file are passed on; an npz without i or j raises KeyError.
    """
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            sides = [arrays["i"], arrays["j"]]
    else:
        table, columns = read_table(path, "i,j")
        if (columns, table.shape[1]) != (2, 2):
            raise ValueError(
                f"{counted(columns, 'column')} in the header and {table.shape[1]} in the rows: expected 2 in"
                " both; give two image indices per line"
            )
        sides = [table[column].to_numpy() for column in table]
    for side in sides:
        if side.dtype.kind not in "iu":
            raise ValueError(f"indices of {side.dtype}: expected integers; give two image indices per pair")
    i, j = (torch.from_numpy(side.astype(np.int64)) for side in sides)
    return i, j


def read_labels(path: Path, num: int) -> scipy.sparse.csr_array:
    """Read the labels (num, C) of all images, 0 or 1 in float32, from a CSV's columns or from Y of an npz.

    Raises ValueError if a CSV has no header, if there are not `num` rows, and for other values than 0 and 1.
    Errors of pandas and NumPy for a malformed file are passed on; an npz without Y raises KeyError.
    """
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            Y = arrays["Y"]
    else:
        table, columns = read_table(path, "cat,dog")
        if table.shape[1] != columns:
            raise ValueError(
                f"{counted(columns, 'column')} in the header and {table.shape[1]} in the rows: expected the"
                " same number; give one column per label"
            )
        Y = table.to_numpy()
    if Y.ndim != 2 or len(Y) != num:
        raise ValueError(
            f"labels of shape {Y.shape}: expected ({num}, C); give one row per image of the data set"
        )
    if Y.dtype.kind not in "biuf" or not np.isin(Y, (0, 1)).all():
        raise ValueError("labels: expected 0 or 1 in every place; give one column per label")
    return scipy.sparse.csr_array(Y.astype(np.float32))


def read_table(path: Path, example: str) -> tuple[pd.DataFrame, int]:
    """Read a CSV of numbers below its header, and the number of columns of the header.

    Raises ValueError if the first line holds only numbers.
    """
    header = pd.read_csv(path, nrows=0).columns
    if pd.to_numeric(header.to_series(), errors="coerce").notna().all():
        raise ValueError(
            f"first line {','.join(header)}: expected column names, such as {example}; add a header line"
        )
    # without skipping the header, pandas would take extra columns as an index
    return pd.read_csv(path, header=None, skiprows=1), len(header)
