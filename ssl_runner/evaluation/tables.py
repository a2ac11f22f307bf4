"""Files of features: blocks of rows -> .npz, .csv or .parquet, without all rows in memory."""

import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import pandas as pd

from ssl_runner.errors import UsageError

Block = Mapping[str, np.ndarray]  # columns of equal length: (n,), or float32 (n, d)


class NpzTable:
    """One array per column. Rows of float32 columns wait in temporary files beside the target."""

    def __init__(self, file: BinaryIO, folder: Path):
        self.file, self.folder = file, folder
        self.small: dict[str, list[np.ndarray]] = {}
        self.wide: dict[str, tuple[IO[bytes], int]] = {}  # column -> rows on disk, width
        self.rows = 0

    def write(self, block: Block) -> None:
        for name, values in block.items():
            if values.ndim == 1:
                self.small.setdefault(name, []).append(values)
            else:
                if name not in self.wide:
                    temporary = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115, closed by close
                    self.wide[name] = (temporary, values.shape[1])
                self.wide[name][0].write(np.ascontiguousarray(values, "<f4").data)
        self.rows += len(next(iter(block.values())))

    def finish(self) -> None:
        with zipfile.ZipFile(self.file, "w") as archive:
            for name, (rows, width) in self.wide.items():
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, width)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    rows.seek(0)
                    shutil.copyfileobj(rows, member, 2**20)
            for name, parts in self.small.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.concatenate(parts), allow_pickle=False)

    def close(self) -> None:
        for rows, _ in self.wide.values():
            rows.close()


class CsvTable:
    """One column per feature: features_0, features_1, ..."""

    def __init__(self, file: BinaryIO, folder: Path):
        self.file, self.first = file, True

    def write(self, block: Block) -> None:
        columns: dict[str, Any] = {}
        for name, values in block.items():
            wide = {f"{name}_{k}": values[:, k] for k in range(values.shape[1])} if values.ndim == 2 else {}
            columns |= wide or {name: values}
        text = pd.DataFrame(columns).to_csv(index=False, header=self.first, lineterminator="\n")
        self.file.write(text.encode())
        self.first = False

    def finish(self) -> None:
        """Every block is in the file already."""

    def close(self) -> None:
        """Nothing to release."""


class ParquetTable:
    """One row group per block; features are lists of float32 of fixed size."""

    def __init__(self, file: BinaryIO, folder: Path):
        import pyarrow
        import pyarrow.parquet

        self.pyarrow, self.file = pyarrow, file
        self.writer: Any = None

    def write(self, block: Block) -> None:
        pyarrow = self.pyarrow
        columns = {
            name: pyarrow.array(values)
            if values.ndim == 1
            else pyarrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
            for name, values in block.items()
        }
        table = pyarrow.table(columns)
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(self.file, table.schema)
        self.writer.write_table(table)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()

    close = finish  # a writer that stays open would write to the closed file when it is deleted


FORMATS: dict[str, Any] = {".npz": NpzTable, ".csv": CsvTable, ".parquet": ParquetTable}


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UsageError if the features cannot be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"-o {path}: expected a name that ends with {', '.join(FORMATS)}; rename it")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: expected an existing folder {path.parent}; create it")
    if path.is_dir():
        raise UsageError(f"-o {path}: expected a file, found a folder; give another name")
    if path.exists() and not overwrite:
        raise UsageError(f"-o {path}: expected a new file; give another name, or --overwrite")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"-o {path}: expected pyarrow to be installed; run pip install pyarrow, or write .npz"
            ) from error
