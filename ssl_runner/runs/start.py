"""The folder of a run until training begins: made by Hydra, locked, and removed if the run does not begin."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ssl_runner.config import hydra_internals, paths
from ssl_runner.runs import resume

HYDRA_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")


@contextmanager
def opened(cfg: DictConfig) -> Iterator[tuple[DictConfig, Path]]:
    """Context manager of a job. Yields its resolved configuration and its folder, which is made and locked.

    The folder is the one that Hydra has made, or that of an earlier run, see `resume.folder_of`. The working
    directory becomes the one of the command. If the folder holds no run.json on exit, then training has not
    begun: what this start has made, the folder included, is removed.
    """
    made = hydra_internals.output_dir()
    os.chdir(hydra_internals.launch_folder())  # with hydra.job.chdir relative paths would be those of the run
    with undone_on_error():
        cfg = paths.resolved(cfg)
        folder = resume.folder_of(cfg, made)
    if folder != made and not any(made.iterdir()):
        made.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    with resume.lock_folder(folder):
        try:
            yield cfg, folder
        finally:
            if not (folder / "run.json").exists():
                discard(folder, folder / ".lock")


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Context manager of the first lines of a job, after which the folder that Hydra has made is removed if
    an error or a signal ends them."""
    try:
        yield
    except BaseException:
        discard(hydra_internals.output_dir())
        raise


def discard(folder: Path, *files: Path) -> None:
    """Remove `files` and those of Hydra, then the folder and its parents, as far as this start made them and
    nothing else is in them. A folder with a run is left as it is."""
    if (folder / "run.json").exists():
        return
    kept, names = hydra_internals.existing_before(folder)
    logs = []
    for handler in [one for one in logging.root.handlers if isinstance(one, logging.FileHandler)]:
        logs.append(Path(handler.baseFilename))
        logging.root.removeHandler(handler)
        handler.close()
    folders = [folder / name for name in {".hydra", HydraConfig.get().output_subdir or ".hydra"}]
    for path in (*files, *logs, *(one / name for one in folders for name in HYDRA_FILES)):
        if path.is_relative_to(folder) and path.relative_to(folder).parts[0] not in names:
            path.unlink(missing_ok=True)
    for path in (*(one for one in folders if one.name not in names), folder, *folder.parents):
        if path == kept or not path.is_relative_to(kept):
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # something else is in it
            return
