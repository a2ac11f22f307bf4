"""Runs from Python, for example in a notebook: `ssl_runner.run` does what `ssl-run` does."""

import contextlib
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from ssl_runner import cli
from ssl_runner.config import arguments, compose, hydra_internals, paths
from ssl_runner.errors import UsageError, counted
from ssl_runner.runs import start

RESULT = ("loss", "top1", "val_top1")
RUNNING = threading.Lock()  # Hydra's state, the working directory and torch's random state are global


@dataclass(frozen=True)
class Result:
    """A finished run.

    folder     the run folder, absolute
    metrics    metrics.csv, one row per epoch
    probes     probe.csv, one row per probe, features and split; empty without labels
    result     last `loss`, and `top1` (test) and `val_top1` of the first probe, in [0, 1]
    """

    folder: Path
    metrics: pd.DataFrame = field(repr=False)
    probes: pd.DataFrame = field(repr=False)
    result: dict[str, float | None]


def run(
    *overrides: str,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    config_dir: str | Path | None = None,
) -> Result:
    """Train and probe, as `ssl-run <overrides>` does: `run("loss=vicreg", "gamma=25")`.

    Writes the same files to the same folder, outputs/<dataset>/<loss>/<time>-<id>, or to `folder`.

    resume      folder of a run to resume, or to extend with "epochs=<more>"; "auto" finds the run
    config_dir  folder with configs of your own (`--config-dir`)

    The working directory, signal handlers, Hydra's global state and torch's switches of arithmetic
    (`ssl_runner.numerics`) are restored; torch's random state is not.

    Raises UsageError, with the message that `ssl-run` prints, for invalid input, and any error of the
    training itself; a note names the folder, if the run has begun. SIGTERM and SIGUSR1 raise Preempted, a
    SystemExit, in the main thread.
    """
    refuse_unsupported(overrides, folder, resume)
    words = list(overrides)
    if folder is not None:
        words.append(f"hydra.run.dir={paths.quote(Path(folder).expanduser().resolve())}")
    if resume is not None:
        words.append(
            "resume=auto"
            if resume == "auto"
            else f"resume={paths.quote(Path(resume).expanduser().resolve())}"
        )
    if config_dir is not None:
        words.append(f"--config-dir={Path(config_dir).expanduser().resolve()}")
    if not RUNNING.acquire(blocking=False):
        raise UsageError(
            "run: expected one run at a time in a process; wait for it, or start a second process"
        )
    try:
        path, result = execute(words)
    finally:
        RUNNING.release()
    probes = path / "probe.csv"
    return Result(
        folder=path,
        metrics=pd.read_csv(path / "metrics.csv"),
        probes=pd.read_csv(probes) if probes.exists() else pd.DataFrame(),
        result={name: result[name] for name in RESULT if name in result},
    )


def execute(words: list[str]) -> tuple[Path, dict[str, float | None]]:
    """Execute the run of a command line. Returns its folder and its result."""
    ended: list[tuple[Path, dict[str, float | None]] | Exception] = []
    parser = arguments.parser()
    with hydra_internals.preserved_state(), contextlib.chdir(Path.cwd()):
        compose.register_resolvers()
        compose.prefer_our_presets()
        args = arguments.parse(parser, words)
        jobs = cli.prepare(args, processes=1)
        if args.multirun:
            raise UsageError(
                f"run: expected a single run, but the experiment sweeps ({counted(len(jobs), 'job')}, the"
                f" first with {jobs[0][0]}); give one value for each option, or use ssl-run"
            )
        task = partial(job, ended=ended, kept=start.existing(args.overrides))
        hydra_internals.run_hydra(args, parser, task, compose.CONF)
    [outcome] = ended
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def refuse_unsupported(
    overrides: tuple[str, ...], folder: str | Path | None, resume: str | Path | None
) -> None:
    """Raise UsageError for what only the command line can do, and for a folder that is given twice."""
    if folder is not None and resume not in (None, "auto"):
        raise UsageError(f"folder={folder}: expected no folder together with resume={resume}; leave one out")
    for line in overrides:
        if not isinstance(line, str):
            raise UsageError(f"run: expected overrides as strings, such as 'epochs=5', found {line!r}")
        if line.startswith("--config-dir"):
            raise UsageError(f"{line}: expected the argument config_dir of run; use it instead")
        if line.startswith("-") or line.upper() == "HYDRA.MODE=MULTIRUN":
            raise UsageError(f"{line}: expected <group>=<name> or <key>=<value>; write a sweep as a loop")
    free = ("resume=auto", "resume=null")
    twice = [
        line for line in overrides if line.startswith(("hydra.run.dir=", "resume=")) and line not in free
    ]
    if folder is not None and twice:
        raise UsageError(f"folder={folder}: expected no folder together with {twice[0]}; leave one out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("run: expected a single process; start several with torchrun -m ssl_runner")


def job(
    cfg: DictConfig, ended: list[tuple[Path, dict[str, float | None]] | Exception], kept: Collection[Path]
) -> None:
    """Execute the run and add its folder and result to `ended`, or its error, which Hydra would print.

    The folders `kept` are not removed.
    """
    folder = hydra_internals.output_dir()
    try:
        with start.opened(cfg, kept) as (cfg, folder, abandon):
            ended.append((folder, cli.run_or_skip(cfg, folder, abandon)))
    except BaseException as error:
        if (folder / "run.json").exists():
            error.add_note(f"folder of the run: {folder}")
        if not isinstance(error, Exception):
            raise
        ended.append(error)
