"""A finished run: its configuration with other data or probes, and the data set as its network takes it.

This module does not import torch before data is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from ssl_runner.config import check, compose, paths
from ssl_runner.config.rules import check_values, format_value
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.names import EVALUATION
from ssl_runner.runs import resume, saved
from ssl_runner.runs.run_json import read_record

if TYPE_CHECKING:
    import torch

    from ssl_runner.data.dataset import DataSet
    from ssl_runner.pretrained import Transform

SETTABLE = ("dataset", "probe", "device", "precision")  # groups and options that an evaluation may change
PATHS = ("root", "files", "cache")  # options of a data set that may be relative paths
SAME_IMAGES = ("channels", "storage", "cache", "on_error")  # options that change neither images nor splits


def config_of(
    folder: Path,
    lines: list[str],
    config_dir: str | None = None,
    settable: Sequence[str] = SETTABLE,
    instead: str = "leave it out, the network is trained already",
) -> DictConfig:
    """Return the configuration of a finished run, with the overrides `lines` of `settable`.

    `dataset=<name>` or `probe=<name>` replaces the whole group by its defaults, except for the evaluation
    transform, which stays that of the run unless the group or `lines` set one. Any other option keeps the
    value of the run, or has its default if the run was made before the option existed. Relative paths that
    the run was given stay relative to its working directory.
    `dataset.files` replaces the run's `dataset.root`, and vice versa. The name of a data set whose images or
    splits differ from the run's lists its options that differ; that of another data set lists the options
    that differ from its defaults.

    Raises UsageError if there is no finished run in the folder, or for an override that is not accepted;
    `instead` says what to do about an override that is not settable.
    """
    record = finished_record(folder)
    given = compose.parse(lines)
    check_settable(given, settable, instead)
    keys = {override.key_or_group for override in given}
    config: Any = saved.load(folder)
    choices = saved.choices(folder)
    config_dir = config_dir or resume.config_dir_of(folder)
    composed = compose_groups(
        [f"{group}={choices[group]}" for group in ("dataset", "probe") if group not in keys] + lines,
        config_dir,
    )
    for path in PATHS:
        if config.dataset.get(path) is not None:
            config.dataset[path] = absolute(config.dataset[path], Path(record["cwd"]))
    config = OmegaConf.merge(config, {key: composed[key] for key in composed if key not in config})
    own = config.dataset.copy()
    transform = {key: own.get(key) for key in EVALUATION}
    for group in ("dataset", "probe"):
        config[group] = composed[group] if group in keys else OmegaConf.merge(composed[group], config[group])
    for one, other in (("root", "files"), ("files", "root")):
        if f"dataset.{one}" in keys and f"dataset.{other}" not in keys and other in config.dataset:
            config.dataset[other] = None
    for key in keys - {"dataset", "probe"}:
        OmegaConf.update(config, key, paths.escape(OmegaConf.select(composed, key)), force_add=True)
    if own.name != config.dataset.name and "dataset" in keys:
        own = compose_groups([line for line in lines if line.startswith("dataset=")], config_dir).dataset
    elif any(key not in own for key in config.dataset):  # the run was made before these options existed
        own = OmegaConf.merge(compose_groups([f"dataset={choices.dataset}"], config_dir).dataset, own)
    if "dataset" in keys:
        keep_transform(own, transform)
        if not keys & {f"dataset.{key}" for key in EVALUATION}:
            keep_transform(config.dataset, transform)
    if "dataset.name" not in keys and (changed := changed_options(own, config.dataset)):
        config.dataset.name = paths.escape(f"{own.name}:{changed}")
    check_values(config, evaluation=True)
    return config


def keep_transform(dataset: DictConfig, transform: Mapping[str, int | None]) -> None:
    """Set the evaluation transform of a data set that has none."""
    if all(dataset[key] is None for key in EVALUATION):
        dataset.update(transform)


def finished_record(folder: Path) -> dict[str, Any]:
    """Return run.json. Raises UsageError if the folder has no finished run."""
    if not (folder / "run.json").is_file() or not (folder / ".hydra" / "hydra.yaml").is_file():
        raise UsageError(
            f"{folder}: expected the folder of a run; give one that contains run.json and .hydra"
        )
    record = read_record(folder / "run.json")
    if record["status"] != "done":
        raise UsageError(
            f"{folder}: expected a finished run, found status {record['status']}; finish it with"
            f" ssl-run {paths.override('resume', folder)}"
        )
    return record


def check_settable(given: Iterable[Override], settable: Sequence[str], instead: str) -> None:
    """Raise UsageError for an override that an evaluation of a finished run does not take."""
    for override in given:
        if override.key_or_group.partition(".")[0] not in settable:
            raise UsageError(f"{override.input_line}: expected options of {', '.join(settable)}; {instead}")
        if override.is_sweep_override():
            raise UsageError(f"{override.input_line}: expected one value; write a list as [a,b]")


def compose_groups(lines: list[str], config_dir: str | None) -> DictConfig:
    """Compose and validate a configuration, with all interpolations resolved."""
    compose.register_resolvers()
    compose.prefer_our_presets()
    args = argparse.Namespace(
        overrides=lines, config_dir=config_dir, config_path=None, config_name=None, multirun=False
    )
    [(_, composed)] = check.check(args, evaluation=True)
    return paths.resolved(composed)


def absolute(path: Any, base: Path) -> Any:
    """The path, or each of a list of paths, as an absolute path; relative ones are in `base`."""
    if isinstance(path, ListConfig):
        return [absolute(one, base) for one in path]
    return paths.escape(str(base / Path(path).expanduser()))


def changed_options(own: DictConfig, other: DictConfig) -> str:
    """The options in which a data set differs from that of the run, such as `root=/data/x,subset=100`.

    Returns "" for the same images and splits, and for a data set of another name.
    """
    if own.name != other.name:
        return ""
    before, after = ([one.get(key) for key in EVALUATION] for one in (own, other))
    # with the same transform, or none, `read_data` sets a size of null to that of the run
    size_matters = before != after or (any(after) and other.get("size") is not None)
    ignored = SAME_IMAGES if size_matters else (*SAME_IMAGES, "size")
    shared = [str(key) for key in other if key in own and key not in ignored]
    then, now = (
        {key: real(one[key]) if key in PATHS else one[key] for key in shared} for one in (own, other)
    )
    changed = [key for key in shared if then[key] != now[key]]
    if "root" in changed and "files" in changed:  # one of them replaces the other
        changed.remove("root" if now["root"] is None else "files")
    return ",".join(f"{key}={printable(format_value(now[key]))}" for key in changed)


def real(path: Any) -> Any:
    """The path, or each of a list of paths, without symbolic links; None stays None."""
    if isinstance(path, ListConfig):
        return [real(one) for one in path]
    return None if path is None else str(Path(path).expanduser().resolve())


def read_data(cfg: DictConfig, transform: Transform, device: torch.device) -> DataSet:
    """Read the data set of `cfg` for a network with this transform, whose mean and std it gets.

    If the data set has the option `size`, and it is null, images are resized to the size of the run's stored
    images if `cfg` has the evaluation transform of the run, and to that of the network's input if `cfg` has
    none. With another transform they keep their size.

    Raises UsageError for images of another size or with other channels.
    """
    from ssl_runner import build

    size, channels = transform.image_size, transform.channels
    cfg = cfg.copy()
    values = {"channels": channels}
    evaluation = cfg.dataset.eval_resize, cfg.dataset.eval_crop
    if evaluation == (transform.evaluation.resize, transform.evaluation.crop):
        values["size"] = transform.stored_size or size
    elif evaluation == (None, None):
        values["size"] = size
    for name, value in values.items():
        if name in cfg.dataset and cfg.dataset[name] is None:
            cfg.dataset[name] = value
    data = build.read_data(cfg, device)
    if (data.image_size, data.channels) != (size, channels):
        names = ("size", "channels") if evaluation == (None, None) else ("eval_crop", "channels")
        settings = [f"dataset.{name}" for name in names if name in cfg.dataset]
        todo = f"set {' and '.join(settings)}" if settings else "use another data set"
        raise UsageError(
            f"dataset={data.name}: expected {size} x {size} pixels and {channels} channels, as the network"
            f" takes them, found {data.image_size} x {data.image_size} and {data.channels}; {todo}"
        )
    return replace(data, mean=transform.mean.to(device), std=transform.std.to(device))


def warn_other_images(folder: Path, cfg: DictConfig, data: DataSet) -> None:
    """Print a line on standard error if `data` is the run's own data set, but its images have changed."""
    own = saved.load(folder).dataset.name
    record = read_record(folder / "run.json")
    if cfg.dataset.name == own and (change := resume.changed_images(record, data.digest, data.counts)):
        print(
            f"warning: the images of {resume.location(cfg)} have changed since the run: {change}; the splits"
            " may differ from those of the run",
            file=sys.stderr,
            flush=True,
        )
