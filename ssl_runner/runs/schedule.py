"""The planned epochs of a run: one part for a run as it was started, one more for every extension."""

import os
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import compose, paths, rules
from ssl_runner.config.run_id import run_id
from ssl_runner.errors import UsageError, counted
from ssl_runner.runs import filenames, resume, saved
from ssl_runner.runs.files import atomic_write, write_json
from ssl_runner.runs.run_json import read_record

# Parts in order, {"from_epoch": a, "to_epoch": b}: the learning rate of epochs a + 1 .. b has a warm-up and a
# decay of its own. A part that an extension cut short keeps its planned to_epoch.
Schedule = list[dict[str, int]]


def read_schedule(folder: Path, epochs: int) -> Schedule:
    """Return the schedule in run.json, or that of a new run of `epochs` epochs."""
    record = read_record(folder / "run.json") if (folder / "run.json").exists() else {}
    return record.get("schedule") or [{"from_epoch": 0, "to_epoch": epochs}]


def identity(cfg: DictConfig, schedule: Schedule) -> str:
    """Return the identity of a run. It differs for an extended run and one planned for as many epochs."""
    return "-after-".join([run_id(cfg), *(str(part["from_epoch"]) for part in schedule[1:])])


def is_extension(cfg: DictConfig, folder: Path) -> bool:
    """Return whether `cfg`, given with resume=<folder>, has other epochs than the run was planned for."""
    planned = read_schedule(folder, saved.load(folder).epochs)[-1]["to_epoch"]
    return cfg.resume not in (None, "auto") and cfg.epochs != planned


def extend(cfg: DictConfig, folder: Path) -> DictConfig:
    """Plan more epochs for the run in `folder`, which must be locked. `cfg` is its configuration with these.

    Returns the configuration of the extended run.

    The new part begins after the epoch of the last checkpoint. The results of a finished run are copied to
    epochs-<planned>/, and its configuration to .hydra/config-<planned>.yaml. Raises UsageError, before
    anything is written, if the run cannot be extended.
    """
    record = read_record(folder / "run.json")
    schedule = read_schedule(folder, saved.load(folder).epochs)
    planned = schedule[-1]["to_epoch"]
    new_run = f"start a new run with {paths.override('init_weights', folder / filenames.BACKBONE)}"
    if cfg.epochs < planned:
        raise UsageError(
            f"epochs={cfg.epochs}: expected more than the {counted(planned, 'epoch')} that {folder} was"
            f" planned for; {'give more' if record['status'] == 'done' else 'leave epochs out'}, or"
            " leave resume out to start a new run"
        )
    cfg = extended_config(cfg, folder)
    solver: Any = get_class(cfg.solver._target_)
    if not solver.trains:
        raise UsageError(
            f"epochs={cfg.epochs}: expected a solver that trains, to extend a run; start a new run"
        )
    if cfg.views.resolutions is not None:
        raise UsageError(
            f"epochs={cfg.epochs}: a run with views.resolutions cannot be extended, because these are spread"
            f" over its planned epochs; {new_run}"
        )
    begin = next_epoch(folder)
    if record["status"] == "done" and begin < planned:
        raise UsageError(f"epochs={cfg.epochs}: {folder} has no checkpoint of its last epoch; {new_run}")
    if cfg.epochs - begin < cfg.optimizer.warmup_epochs:
        raise UsageError(
            f"epochs={cfg.epochs}: expected at least {begin} + optimizer.warmup_epochs, which is"
            f" {begin + cfg.optimizer.warmup_epochs}; give more epochs"
        )
    if record["status"] == "done":
        copy_results(folder, folder / f"epochs-{planned}")
    write_config(cfg, cfg.epochs, planned, folder)
    parts = [part for part in schedule if part["from_epoch"] < begin]
    parts.append({"from_epoch": begin, "to_epoch": cfg.epochs})
    write_json(folder / "run.json", record | {"status": "preempted", "schedule": parts})
    return cfg


def remove_outdated(folder: Path) -> None:
    """Remove the weights and pictures of a shorter run, which was extended. They are in epochs-<planned>/."""
    if any(folder.glob(f"{resume.EXTENDED}/run.json")):
        for name in filenames.OUTDATED:
            (folder / name).unlink(missing_ok=True)


def extended_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of the run with the `epochs` of `cfg`.

    Options that follow `epochs`, such as `every: ${epochs}`, may change with it. Raises UsageError for a
    change of another option.
    """
    config = saved.completed(folder)
    task = compose.parse(HydraConfig.get().overrides.task)  # interpolations are resolved in these
    first = compose.parse(saved.overrides(folder))
    follow = {override.key_or_group for override in first if "${" in str(override.input_line)}
    given = {override.key_or_group for override in task} - follow
    before = config.epochs
    for key in list(rules.dotted_keys(config)):
        follows = OmegaConf.select(config, key) == before and OmegaConf.select(cfg, key) == cfg.epochs
        if key == "epochs" or (follows and key not in given):
            OmegaConf.update(config, key, cfg.epochs)
    saved.refuse_changes(cfg, config)
    return config


def next_epoch(folder: Path) -> int:
    """Return the number of finished epochs at the end of the epoch of the last checkpoint.

    A checkpoint counts the epochs before the one in which it was written.
    """
    from ssl_runner.runs import checkpoint  # imports torch

    path = checkpoint.find(folder)
    if path is None:
        return 0
    with checkpoint.restoring(path):
        return int(checkpoint.load(path)["epoch"]) + 1


def copy_results(folder: Path, target: Path) -> None:
    """Copy the files of a finished run, except its checkpoints, to `target`, unless that exists."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in (path for pattern in filenames.RESULTS for path in folder.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, partial / path.name)
    os.replace(partial, target)


def write_config(config: DictConfig, epochs: int, planned: int, folder: Path) -> None:
    """Write the configuration and overrides of the extended run to .hydra/; keep the configuration before."""
    hydra = folder / ".hydra"
    before = hydra / f"config-{planned}.yaml"
    if not before.exists():
        shutil.copy2(hydra / "config.yaml", before)
    overrides = [line for line in saved.overrides(folder) if not line.startswith("epochs=")]
    contents = {"overrides": OmegaConf.create([*overrides, f"epochs={epochs}"]), "config": config}
    for name, content in contents.items():
        with atomic_write(hydra / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(content).encode())
