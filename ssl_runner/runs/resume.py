"""Resuming runs: find the run, check that it can be resumed, and plan the command line that resumes it."""

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
from filelock import AcquireReturnProxy, FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import compose, paths, rules
from ssl_runner.config.run_id import run_id
from ssl_runner.errors import UsageError, counted
from ssl_runner.runs import filenames, saved
from ssl_runner.runs.run_json import read_record

EXTENDED = "epochs-*"  # folders in that of an extended run: its results before the extension


def refuse_occupied(folder: Path) -> None:
    """Raise UsageError if the folder or a direct subfolder contains a run, or the folder files of one."""
    for taken in (folder, *folder.glob("*")):
        if (taken / "run.json").exists():
            epochs = None
            with suppress(UsageError):  # damaged files: resume says which
                epochs = epochs_if_done(taken)
            raise UsageError(
                f"{taken} already contains a run: choose another folder, or"
                f" {'resume it' if epochs is None else 'train it longer'} with"
                f" {paths.override('resume', taken)}{'' if epochs is None else f' epochs={2 * epochs}'}"
            )
    if there := [name for name in filenames.REPLACED if (folder / name).exists()]:
        raise UsageError(
            f"{folder} contains {', '.join(there)}, which a run would overwrite: choose another folder, or"
            " remove these files"
        )


def epochs_if_done(folder: Path) -> int | None:
    """Return the epochs of the run in a folder, None unless it is done. UsageError: a file is damaged."""
    done = read_record(folder / "run.json")["status"] == "done"
    return int(saved.load(folder).epochs) if done else None


def check_creatable(option: str, folder: Path) -> None:
    """Raise UsageError if the folder cannot be created or written to. Leaves nothing behind.

    A path with an interpolation is not checked.
    """
    if "${" in str(folder):
        return
    made: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            if not path.exists():  # x/.. exists when x does
                path.mkdir()
                made.append(path)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{option}={folder}: expected a folder that can be created and written to, found"
            f" '{error.strerror}'; choose another one"
        ) from error
    finally:
        for path in reversed(made):
            path.rmdir()


def folder_of(cfg: DictConfig, made: Path) -> Path:
    """Return the folder in which to execute a run, given the folder `made` by Hydra.

    With resume=auto this is the folder of the unfinished or finished run with the same identity, if there is
    one; otherwise it is `made`. Raises UsageError if the folder contains another run.
    """
    if cfg.resume is not None and cfg.resume != "auto":
        return made
    record = read_record(made / "run.json") if (made / "run.json").exists() else None
    if cfg.resume == "auto":
        matches = [path.parent for path in candidate_runs(made) if is_same_run(cfg, path.parent)]
        if matches:
            return max(
                matches,
                key=lambda folder: (
                    read_record(folder / "run.json")["status"] == "done",
                    folder.stat().st_mtime,
                ),
            )
        if record is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            # an earlier sweep used this job number
            return made.with_name(f"{made.name}-{run_id(cfg)[:8]}")
    elif (
        record is not None
        and record.get("slurm_job") == os.environ.get("SLURM_JOB_ID", "")
        and is_same_run(cfg, made)
    ):
        return made  # this job was requeued by Slurm
    refuse_occupied(made)
    return made


def is_same_run(cfg: DictConfig, folder: Path) -> bool:
    """Return whether the run in `folder` has this configuration. False if its files are corrupt, for example
    after a power cut, and for an extended run."""
    try:
        record = read_record(folder / "run.json")
    except UsageError:
        return False
    extended = len(record.get("schedule") or ()) > 1
    return record.get("identity") == run_id(cfg) or (not extended and saved.matches(cfg, folder))


def candidate_runs(made: Path) -> list[Path]:
    """Return the run.json paths of all runs that resume=auto considers.

    For a single run, these are the runs with the same data set and loss; for a sweep, the runs of all sweeps.
    If the command line sets hydra.run.dir or hydra.sweep.dir, only runs in that folder are considered. The
    results of extended runs before their extension are among them.
    """
    hydra_config = HydraConfig.get()
    named = any(
        str(line).startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for line in hydra_config.overrides.hydra
    )
    if hydra_config.mode == RunMode.MULTIRUN:
        sweep = Path(hydra_config.sweep.dir).absolute()
        base, runs = (sweep, "*") if named else (sweep.parent, "*/*")
    elif named:
        own = made / "run.json"
        return [own] if own.exists() else []
    else:
        base, runs = made.parent, "*"
    return [*sorted(base.glob(f"{runs}/run.json")), *sorted(base.glob(f"{runs}/{EXTENDED}/run.json"))]


def lock_folder(folder: Path) -> AcquireReturnProxy:
    """Lock the folder for the lifetime of the run. Raises UsageError if another process holds the lock."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{folder} is in use by another process: wait for it, or choose another folder"
        ) from None


def write_hydra_files(cfg: DictConfig, folder: Path) -> None:
    """Write .hydra/: the resolved configuration, the overrides, and Hydra's own configuration."""
    hydra_config = HydraConfig.get()
    (folder / ".hydra").mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    OmegaConf.save(hydra_config.overrides.task, folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(
        OmegaConf.create({"hydra": OmegaConf.to_container(hydra_config)}), folder / ".hydra" / "hydra.yaml"
    )


@dataclass(frozen=True)
class ResumePlan:
    """How to resume a run: what to add to the command line, and where to execute it."""

    overrides: list[str]  # those that the run was started with, unless given again, and its hydra.run.dir
    config_dir: str | None  # --config-dir
    directory: Path  # the working directory of the run, against which relative paths are resolved


def plan_resume(folder: Path, given: Collection[str], config_dir: str | None) -> ResumePlan:
    """Return the plan for resume=<folder>, given the keys and the --config-dir of the command line.

    Raises UsageError if the folder has no run that can be resumed.
    """
    if not (folder / "run.json").is_file() or not (folder / ".hydra" / "overrides.yaml").is_file():
        raise UsageError(
            f"resume={folder}: expected the folder of a run; give one that contains run.json and .hydra"
        )
    record = read_record(folder / "run.json")
    if "epochs" not in given:  # more epochs extend a finished run
        refuse_finished(folder)
    if not Path(record["cwd"]).is_dir():
        raise UsageError(
            f"resume={folder}: the working directory of the run, {record['cwd']}, no longer exists;"
            " recreate it, or start a new run"
        )
    if record["status"] == "running" and is_running(record):
        raise UsageError(
            f"resume={folder}: this run is still running as process {record['pid']}; wait for it to end"
        )
    overrides = compose.parse(saved.overrides(folder))
    if "logger" in given:  # the options of another logger go with it
        overrides = [one for one in overrides if not one.key_or_group.startswith("logger.")]
    added = [str(override.input_line) for override in overrides if override.key_or_group not in given]
    if "epochs" not in {*given, *(override.key_or_group for override in overrides)}:
        added.append(f"epochs={saved.load(folder).epochs}")  # a preset may have other epochs by now
    return ResumePlan(
        overrides=[*added, f"hydra.run.dir={paths.quote(folder)}"],
        config_dir=str(Path(config_dir).resolve()) if config_dir is not None else config_dir_of(folder),
        directory=Path(record["cwd"]),
    )


def refuse_finished(folder: Path) -> None:
    """Raise UsageError if the run is done."""
    if (epochs := epochs_if_done(folder)) is not None:
        raise UsageError(
            f"resume={folder}: this run is done with its {counted(epochs, 'epoch')}; give more, such as"
            f" epochs={2 * epochs}, to train it longer, or start a new run to change other options"
        )


def config_dir_of(folder: Path) -> str | None:
    """Return the --config-dir that a run was started with. Raises UsageError if the folder is gone."""
    given = saved.config_sources(folder).get("command-line")
    if given is not None and not Path(given).is_dir():
        raise UsageError(
            f"{folder}: expected the folder with configs that the run was started with, {given}, found"
            " none; give the present one with --config-dir"
        )
    return given


def is_running(record: dict) -> bool:
    """Return whether the process that wrote run.json is still running. Always False for another host."""
    if record["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(record["pid"]).create_time() - record["process_started"]) < 1
    except psutil.NoSuchProcess:
        return False


def refuse_other_images(
    cfg: DictConfig, folder: Path, record: dict[str, Any], digest: str, counts: dict[str, int]
) -> None:
    """Raise UsageError if a run that resumes would read other images or labels than those it started with.

    record: run.json before; digest, counts: `DataSet.digest` and `DataSet.counts` now. Runs recorded without
    `data_digest` are accepted.
    """
    if change := changed_images(record, digest, counts):
        exported = folder / filenames.BACKBONE
        weights = exported if exported.exists() else folder / filenames.CHECKPOINT
        raise UsageError(
            f"the images of {location(cfg)} have changed since the run started: {change}; restore them, or"
            f" start a new run with {paths.override('init_weights', weights)}"
        )


def changed_images(record: dict[str, Any], digest: str, counts: dict[str, int]) -> str:
    """Return how the images differ from those in run.json, such as `train 270 -> 570`, or ""."""
    if record.get("data_digest") in (None, digest):
        return ""
    before = record.get("images") or {}
    changed = [f"{split} {before[split]} -> {n}" for split, n in counts.items() if before.get(split, n) != n]
    return ", ".join(changed) or "other files, lengths of files or labels"


def location(cfg: DictConfig) -> str:
    """Return where the images are, as an option."""
    found = [key for key in ("files", "root", "name") if cfg.dataset.get(key) is not None]
    return f"dataset.{found[0]}={rules.format_value(cfg.dataset[found[0]])}"
