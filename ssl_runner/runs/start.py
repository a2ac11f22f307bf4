"""The folder of a run until training begins: locked, and removed if the run ends before."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from ssl_runner.config import hydra_internals, paths
from ssl_runner.runs import resume

FILES = ("run.json", *(f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra")), ".lock")


@contextmanager
def opened(cfg: DictConfig) -> Iterator[tuple[DictConfig, Path, Callable[[], None] | None]]:
    """Context manager of a job. Yields its resolved configuration, its folder, which is made and locked, and
    a function that removes the folder of a new run that has not begun (None for an earlier run).

    The folder is the one that Hydra has made, or that of an earlier run, see `resume.folder_of`. The working
    directory becomes the one of the command. If the folder holds no run.json on exit, the run has not begun,
    and the folder is removed. Files that were in it before stay.
    """
    from ssl_runner import distributed  # imports torch

    made = hydra_internals.output_dir()
    os.chdir(hydra_internals.launch_folder())  # with hydra.job.chdir relative paths would be those of the run
    with undone_on_error():
        cfg = paths.resolved(cfg)
        folder = resume.folder_of(cfg, made)
    if folder != made:
        remove_empty(made)
    folder.mkdir(parents=True, exist_ok=True)
    new = [folder / name for name in FILES if not (folder / name).exists()]

    def remove_unless_begun(*_failure: object) -> None:
        if not (folder / "run.json").exists():
            remove(folder, new)

    with resume.lock_folder(folder):
        distributed.on_peer_failure(remove_unless_begun)
        try:
            yield cfg, folder, partial(remove, folder, new) if folder / "run.json" in new else None
        finally:
            remove_unless_begun()


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Context manager of a job's first lines: an error or a signal removes the folder that Hydra made."""
    try:
        yield
    except BaseException:
        remove_empty(hydra_internals.output_dir())
        raise


def remove(folder: Path, files: list[Path]) -> None:
    """Remove these files of the folder, which empties the list, then the folders that are empty."""
    while files:
        files.pop().unlink(missing_ok=True)
    remove_empty(folder / ".hydra")
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Remove the folder if it is empty, then its empty parents in outputs/ of the folder of the command."""
    launched = Path(hydra_internals.launch_folder())
    for path in (folder, *folder.parents):
        if path == launched or (path != folder and not path.is_relative_to(launched / "outputs")):
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # it is not empty, or a link
            return
