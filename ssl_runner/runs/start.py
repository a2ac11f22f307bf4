"""The folder of a run until training begins: locked, and removed if the run ends before."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from ssl_runner.config import compose, hydra_internals, paths
from ssl_runner.runs import filenames, resume


def existing(lines: Iterable[str]) -> frozenset[Path]:
    """Return the folders of the overrides hydra.run.dir and hydra.sweep.dir, outputs/, and those around them,
    as far as they exist before Hydra makes those of the jobs."""
    given = {override.key_or_group: override.value() for override in compose.parse(lines)}
    named = [paths.unquoted(str(given[key])) for key in paths.FOLDERS if key in given]
    found = [
        path for folder in (*named, Path("outputs")) for path in (folder.resolve(), *folder.resolve().parents)
    ]
    return frozenset(path for path in found if path.is_dir())


@contextmanager
def opened(
    cfg: DictConfig, kept: Collection[Path]
) -> Iterator[tuple[DictConfig, Path, Callable[[], None] | None]]:
    """Context manager of a job. Yields its resolved configuration, its folder, which is made and locked, and
    a function that removes the folder of a new run that has not begun (None for an earlier run).

    The folder is the one that Hydra has made, or that of an earlier run, see `resume.folder_of`. The working
    directory becomes the one of the command. If the folder holds no run.json on exit, the run has not begun,
    and the folder is removed, unless it is in `kept`. Files that were in it before stay.
    """
    from ssl_runner import distributed  # imports torch

    made = hydra_internals.output_dir()
    os.chdir(hydra_internals.launch_folder())  # with hydra.job.chdir relative paths would be those of the run
    with undone_on_error(kept):
        cfg = paths.resolved(cfg)
        folder = resume.folder_of(cfg, made)
    if folder != made:
        remove_empty(made, kept)
    folder.mkdir(parents=True, exist_ok=True)
    new = [folder / name for name in filenames.BEGIN if not (folder / name).exists()]

    def remove_unless_begun(*_failure: object) -> None:
        if not (folder / "run.json").exists():
            remove(folder, new, kept)

    with resume.lock_folder(folder):
        distributed.on_peer_failure(remove_unless_begun)
        try:
            yield cfg, folder, partial(remove, folder, new, kept) if folder / "run.json" in new else None
        finally:
            remove_unless_begun()


@contextmanager
def undone_on_error(kept: Collection[Path]) -> Iterator[None]:
    """Context manager of a job's first lines: an error or a signal removes the folder that Hydra made."""
    try:
        yield
    except BaseException:
        remove_empty(hydra_internals.output_dir(), kept)
        raise


def remove(folder: Path, files: list[Path], kept: Collection[Path]) -> None:
    """Remove these files of the folder, which empties the list, then the folders that are empty."""
    while files:
        files.pop().unlink(missing_ok=True)
    remove_empty(folder / ".hydra", kept)
    remove_empty(folder, kept)


def remove_empty(folder: Path, kept: Collection[Path]) -> None:
    """Remove the folder if it is empty, then its empty parents in outputs/ of the folder of the command.

    Stops at the first that is `kept`.
    """
    launched = Path(hydra_internals.launch_folder())
    for path in (folder, *folder.parents):
        if (
            path == launched
            or path.resolve() in kept
            or (path != folder and not path.is_relative_to(launched / "outputs"))
        ):
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # it is not empty, or a link
            return
