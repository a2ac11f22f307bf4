"""Rows of probe.csv of the baselines, kept between runs: they depend on the images, not on the training."""

import hashlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ssl_runner
from ssl_runner import distributed
from ssl_runner.data.dataset import DataSet
from ssl_runner.errors import one_line
from ssl_runner.runs.files import atomic_write

PIXEL_BYTES = 2**28  # of each split that are hashed: all images, or evenly spaced ones of larger splits
SOURCES = ("probe/*.py", "views/*.py", "data/images.py", "data/eval_transform.py", "backbone.py", "model.py")
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn")

Row = dict[str, Any]


class BaselineCache:
    """Rows of the features named in `networks`, in one JSON file of `folder` per data set and settings.

    A file is used if everything that its rows depend on is the same: name, images, labels and splits of the
    data set, `settings`, the settings of the network, the source code of the probes and of all `_target_` in
    the settings, the content of files named in them, the libraries, the device and the numbers of threads and
    processes. A damaged file is replaced.

    With folder=None all rows are computed. Every rank calls `rows`; the main process reads and writes.
    """

    def __init__(
        self, folder: Path | None, data: DataSet, settings: Mapping[str, Any], networks: Mapping[str, Any]
    ):
        self.folder, self.data, self.settings, self.networks = folder, data, settings, networks
        self.usable = True  # until the folder cannot be read or written, which gives one line

    def rows(self, features: str, compute: Callable[[], Iterable[Row]]) -> list[Row]:
        """Rows of these features, from the cache or as returned by `compute`, with the column `cached`.

        `cached` is None for features that are not in `networks`. Cached rows have the `seconds` of their
        computation.
        """
        if features not in self.networks:
            return [{**row, "cached": None} for row in compute()]
        key = self.key(features) if self.folder is not None and distributed.is_main_process() else {}
        rows = distributed.broadcast_object(self.read(key) if key else None)
        if rows is not None:
            return [{**row, "cached": True} for row in rows]
        rows = list(compute())
        if key and rows:
            self.write(key, rows)
        return [{**row, "cached": False} for row in rows]

    def key(self, features: str) -> dict[str, Any]:
        """Everything that the rows of these features depend on, as it is written to the file."""
        settings = {"features": features, **self.settings, "network": self.networks[features]}
        return json.loads(
            json.dumps({**settings, "data": self.fingerprint, **environment(self.data, settings)})
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of name, classes, splits, labels, statistics, evaluation transform and pixels."""
        data = self.data
        sha256 = hashlib.sha256(repr((data.name, data.digest, data.transform, list(data.classes))).encode())
        for tensor in (data.mean, data.std):
            sha256.update(tensor.cpu().numpy().tobytes())
        for part in (data.train, data.val, data.test):
            shape = part.images.shape[1:]
            sha256.update(repr((len(part), tuple(shape))).encode())
            sha256.update(part.indices.numpy().tobytes() + part.y.cpu().numpy().tobytes())
            step = -(-len(part) * shape.numel() // PIXEL_BYTES) or 1
            for indices in part.indices[::step].split(2048):
                pixels = part.images[indices.to(part.images.device)]
                sha256.update(pixels.cpu().contiguous().numpy().data)
        return sha256.hexdigest()

    def path(self, key: Row) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest(key)[:32]}.json"

    def read(self, key: Row) -> list[Row] | None:
        """The rows in the file of `key`, None without it; a damaged one gives a line on standard error."""
        path = self.path(key)
        try:
            content = json.loads(path.read_text("utf-8"))
            rows = content["rows"]
            if (content["key"], content["sha256"]) == (key, digest(rows)):
                return rows
            reason = "its checksum differs"
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warn_unusable(error)
            return None
        except (ValueError, KeyError, TypeError) as error:
            reason = one_line(error)
        warn(f"{path}: expected cached rows of probe.csv ({reason}); they are computed again")
        return None

    def write(self, key: Row, rows: list[Row]) -> None:
        """Write the file of `key` atomically, or one line on standard error if that is not possible."""
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, concurrent=True) as file:
                content = {"key": key, "rows": rows, "sha256": digest(rows)}
                file.write((json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            self.warn_unusable(error)

    def warn_unusable(self, error: OSError) -> None:
        """Print one line on standard error, for the first file that cannot be read or written."""
        if self.usable:
            reason = error.strerror or one_line(error)
            warn(f"{self.folder}: expected a folder to read and write ({reason}); the rows are not cached")
        self.usable = False


def environment(data: DataSet, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Source code, libraries and device that compute the rows."""
    device = data.mean.device
    cuda = device.type == "cuda"
    return {
        "source": source(settings),
        "libraries": dict(installed()),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "files": named_files(settings),
        "products": torch.get_float32_matmul_precision(),
    }


def named_files(node: Any) -> list[str]:
    """SHA-256 of each existing file that a text in nested settings names, such as a checkpoint."""
    if isinstance(node, str):
        try:
            with open(Path(node).expanduser(), "rb") as file:
                return [hashlib.file_digest(file, "sha256").hexdigest()]
        except (OSError, ValueError, RuntimeError):  # names no file, or cannot be a path
            return []
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    return [sha256 for child in children for sha256 in named_files(child)]


def source(settings: Any) -> str:
    """SHA-256 of the modules that the rows depend on, and of those of each `_target_` in the settings."""
    package = Path(ssl_runner.__file__).parent
    files = {path for pattern in SOURCES for path in package.glob(pattern)}
    files |= {Path(file) for target in targets(settings) if (file := source_file(target))}
    sha256 = hashlib.sha256()
    for content in sorted(file.read_bytes() for file in files):
        sha256.update(content)
    return sha256.hexdigest()


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in nested settings."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        node = node.values()
    elif not isinstance(node, list | tuple):
        return
    for child in node:
        yield from targets(child)


def source_file(target: str) -> str | None:
    """The file that defines a class or function, None for compiled code."""
    module = inspect.getmodule(pkgutil.resolve_name(target))
    return inspect.getsourcefile(module) if getattr(module, "__file__", None) else None  # type: ignore[arg-type]


def installed() -> Iterator[tuple[str, str]]:
    """Names and versions of those LIBRARIES that are installed."""
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def digest(content: Any) -> str:
    """SHA-256 of content in JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
