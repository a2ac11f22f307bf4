"""`ssl-run`: from the command line to run(cfg), with refusals that a person can read. Imports torch only when a job runs, and
where it is one of several processes, of which the first one alone reads the command line."""

import os
import re
import socket
import sys
from pathlib import Path
from typing import NoReturn

import hydra
import psutil
from filelock import AcquireReturnProxy, FileLock, Timeout
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ssl_runner import config
from ssl_runner.errors import Refused
from ssl_runner.metrics import read_json
from ssl_runner.preemption import Preempted, Preemption

FAILED: list[str] = []  # the jobs of this process's sweep that failed


def main() -> None:
    """The console script. Exits with 0 when every run is done, 1 when one was refused or failed, 75 when it was preempted and can
    go on, 130 when interrupted."""
    with Preemption():
        if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            from ssl_runner import distributed

            distributed.start()
            if not distributed.leads():
                follow()
                return
            lead(distributed.size())
            distributed.dismiss()  # nothing was to be run, as with --help
        else:
            lead()


def lead(processes: int = 1) -> None:
    """What a process by itself does, and the first one of several."""
    config.register_resolvers()
    config.prefer_our_presets()
    FAILED.clear()
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises what went wrong instead of printing a traceback and leaving
    )
    try:
        prepare(processes)
        hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print("interrupted; resume=<the run's folder> goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as in `ssl-run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if before == "1":
            raise
        print(said(error), file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"
    if FAILED:
        print(f"failed: {len(FAILED)} of the sweep's jobs, {'; '.join(FAILED)}", file=sys.stderr)
        sys.exit(1)


def prepare(processes: int = 1) -> None:
    """Refuses, before Hydra writes anything, a command line of which some job cannot run; completes that of a resumed run."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise Refused(f"{message}; `ssl-run --help` shows what there is")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args()
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    given = {override.key_or_group: override for override in config.parse(args.overrides)}
    config.check_plugins(given.values())
    auto = "resume" in given and given["resume"].value() == "auto"
    if (args.multirun or "hydra.mode" in given) and processes > 1:
        raise Refused(
            f"a sweep starts many runs, and these {processes} processes train one: start it without torchrun or srun"
        )
    if "resume" in given and given["resume"].value() is not None and not auto:
        if args.multirun:
            raise Refused(
                f"{given['resume'].input_line} continues one run: leave out -m, or give resume=auto"
            )
        folder = Path(str(given["resume"].value())).resolve()
        place = sys.argv.index(str(given["resume"].input_line)) + 1
        sys.argv[place:place] = resumed(folder, given)  # beside it: argparse wants all overrides in one place
        if args.config_dir is None:
            sys.argv += config_dir_of(folder)
        else:
            sys.argv += ["--config-dir", str(Path(args.config_dir).resolve())]
        args = parser.parse_args()
        os.chdir(
            read_json(folder / "run.json")["cwd"]
        )  # relative paths mean what they meant when the run was started
    else:
        for key in ("hydra.run.dir", "hydra.sweep.dir"):
            if key in given and not args.cfg and not auto:
                not_taken(Path(str(given[key].value())))
    jobs = config.check(args)
    if (
        (args.multirun or "hydra.mode" in given)
        and not args.cfg
        and not any(key.startswith("hydra/launcher") for key in given)
    ):
        from ssl_runner.run import check_jobs

        check_jobs(jobs)


def not_taken(folder: Path) -> None:
    """Refuses a folder in which, or one level below which, a run lies."""
    for taken in (folder, *folder.glob("*")):
        if (taken / "run.json").exists():
            raise Refused(
                f"{taken} already holds a run: choose another folder, or go on with it by resume={taken}"
            )


def job(cfg: DictConfig) -> float | None:
    """One run, in the folder that Hydra made for it or that `folder_of` finds; returns the validation accuracy, which a sweeper
    may maximise, None for a job of a sweep that failed. Of several processes the first one decides, and the others follow.

    A failure is told in one line at once. A single run ends there; in a sweep the other jobs go on.
    """
    from ssl_runner import distributed

    distributed.start()
    if not distributed.leads():
        return follow()
    hydra_config = HydraConfig.get()
    made = folder = Path(hydra_config.runtime.output_dir)
    try:
        OmegaConf.resolve(cfg)
        folder = folder_of(cfg, made)
        if folder != made and not any(made.iterdir()):
            made.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder):
            record = read_json(folder / "run.json") if (folder / "run.json").exists() else None
            if record is not None and record["status"] == "done" and cfg.resume in (None, "auto"):
                distributed.dismiss()
                print(f"done already, at {record['started']} from commit {record['git_commit']}", flush=True)
                result = record
            else:
                if record is None:
                    describe(cfg, folder)
                else:
                    not_done(folder)
                    unchanged(cfg, folder)
                distributed.share((OmegaConf.to_container(cfg), str(folder), str(Path.cwd())))
                from ssl_runner.run import run

                result = run(cfg, folder)
    except Preempted as error:
        distributed.failed(error)
        print(f"{error}: resume={folder}, or the same command with resume=auto", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        distributed.failed(error)
        more = (
            ""
            if isinstance(error, Refused) or not (folder / "run.json").exists()
            else f" (more in {folder}/run.json)"
        )
        if hydra_config.mode == RunMode.RUN:
            print(said(error) + more, file=sys.stderr)
            sys.exit(1)
        name = f"#{hydra_config.job.num} ({hydra_config.job.override_dirname})"
        print(f"job {name}: {said(error)}{more}", file=sys.stderr, flush=True)
        if not hydra_config.launcher._target_.endswith("BasicLauncher"):
            raise  # another process's launcher learns of it only so
        FAILED.append(name)
        return None
    distributed.finish()
    print(f"top1={result['top1']:.4f} loss={result['loss']:.6g} run={folder}", flush=True)
    return result["val_top1"]


def follow() -> float | None:
    """The part of every process but the first in one run: what that one has read and decided is done here, too."""
    from ssl_runner import distributed
    from ssl_runner.run import run

    try:
        result = {}
        if (task := distributed.share(None)) is not None:
            cfg, folder, cwd = task
            os.chdir(cwd)  # where relative paths mean what they meant to the first process
            result = run(OmegaConf.create(cfg), Path(folder))
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:  # the first process tells the user
        sys.exit(distributed.failed(error)[0])
    return result.get("val_top1")


def folder_of(cfg: DictConfig, made: Path) -> Path:
    """The folder of a run for which Hydra has made one: that one, but with resume=auto the one in which a run of the same
    identity was begun or is done. Refused where it holds another run."""
    if cfg.resume is not None and cfg.resume != "auto":
        return made
    mine = config.identity(cfg)
    taken = read_json(made / "run.json") if (made / "run.json").exists() else None
    if cfg.resume == "auto":
        same = [path.parent for path in runs_beside(made) if identity_of(path) == mine]
        if same:
            return max(
                same,
                key=lambda folder: (
                    read_json(folder / "run.json")["status"] == "done",
                    folder.stat().st_mtime,
                ),
            )
        if taken is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            return made.with_name(f"{made.name}-{mine[:8]}")  # a job of an earlier sweep had this number
    elif (
        taken is not None
        and taken.get("identity") == mine
        and taken.get("slurm_job") == os.environ.get("SLURM_JOB_ID", "")
    ):
        return made  # Slurm has requeued this very job
    not_taken(made)
    return made


def identity_of(path: Path) -> str | None:
    """The identity in a run.json; None where it cannot be read, as after a power cut."""
    try:
        return read_json(path).get("identity")
    except ValueError:
        return None


def runs_beside(made: Path) -> list[Path]:
    """The run.json of all runs among which resume=auto seeks: those of the same data set and loss, those of all sweeps, or where
    the command line names the folder of the run or the sweep, those in it."""
    hydra_config = HydraConfig.get()
    named = any(
        str(line).startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for line in hydra_config.overrides.hydra
    )
    if hydra_config.mode == RunMode.MULTIRUN:
        sweep = Path(hydra_config.sweep.dir).absolute()
        return sorted(sweep.glob("*/run.json") if named else sweep.parent.glob("*/*/run.json"))
    return sorted(
        [made / "run.json"]
        if named and (made / "run.json").exists()
        else []
        if named
        else made.parent.glob("*/run.json")
    )


def claimed(folder: Path) -> AcquireReturnProxy:
    """A lock on the folder, for as long as the run lives. Refused when another process has it."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise Refused(
            f"{folder} is in use by another process: wait for it, or choose another folder"
        ) from None


def describe(cfg: DictConfig, folder: Path) -> None:
    """Writes .hydra/: the resolved configuration, the overrides, and Hydra's own settings."""
    hydra_config = HydraConfig.get()
    (folder / ".hydra").mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    OmegaConf.save(hydra_config.overrides.task, folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(
        OmegaConf.create({"hydra": OmegaConf.to_container(hydra_config)}), folder / ".hydra" / "hydra.yaml"
    )


def said(error: Exception) -> str:
    """What to tell of an error, on one line: the message where it was written for the user, else also its type."""
    if type(error).__name__ == "UncompletedJobError":  # submitit's, with a whole log in it
        lost = re.search(r"Job (\S+)", str(error))
        return (
            f"job {lost[1] if lost else ''} of the sweep ended without a result, killed or cancelled: its log is in .submitit/ of"
            " the sweep's folder; jobs that still run go on, and the same command with resume=auto does what is missing then"
        )
    from_us = isinstance(error, Refused) or type(error).__module__.startswith("ssl_runner")
    return config.one_line(error) if from_us else f"{type(error).__name__}: {config.one_line(error)}"


def resumed(folder: Path, given: dict[str, Override]) -> list[str]:
    """The overrides to add for resume=<folder>: those that the run was started with (those on the command line win), and its
    folder. Refused when there is no run to go on with."""
    if not (folder / "run.json").is_file() or not (folder / ".hydra" / "overrides.yaml").is_file():
        raise Refused(f"resume={folder} is not the folder of a run: give one that holds run.json and .hydra")
    record = read_json(folder / "run.json")
    not_done(folder)
    if not Path(record["cwd"]).is_dir():
        raise Refused(
            f"resume={folder}: the run was started in {record['cwd']}, which is gone; make it again, or start a new run"
        )
    if record["status"] == "running" and alive(record):
        raise Refused(f"resume={folder}: this run is still running, as process {record['pid']}")
    first = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    added = [
        str(o.input_line) for o in config.parse([str(line) for line in first]) if o.key_or_group not in given
    ]
    quoted = str(folder).replace("'", "\\'")
    return [*added, f"hydra.run.dir='{quoted}'"]


def not_done(folder: Path) -> None:
    """Refuses to go on with a run that is done."""
    if read_json(folder / "run.json")["status"] == "done":
        raise Refused(f"resume={folder}: this run is done; start a new one to train differently")


def config_dir_of(folder: Path) -> list[str]:
    """The --config-dir that a run was started with, as arguments."""
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    paths = [str(source.path) for source in sources if source.provider == "command-line"]
    return ["--config-dir", paths[0]] if paths else []


def alive(record: dict) -> bool:
    """Whether the process that wrote run.json still lives, as far as this host can tell."""
    if record["host"] != socket.gethostname() or not psutil.pid_exists(record["pid"]):
        return False
    return abs(psutil.Process(record["pid"]).create_time() - record["process_started"]) < 1


def unchanged(cfg: DictConfig, folder: Path) -> None:
    """Refuses to go on with a run under another configuration than its own."""
    saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(saved, DictConfig)
    for key in dict.fromkeys([*config.dotted_keys(saved), *config.dotted_keys(cfg)]):
        then, now = OmegaConf.select(saved, key), OmegaConf.select(cfg, key)
        if then != now and key != "resume":
            was = f"{key} was {config.shown(then)}, not {config.shown(now)}"
            raise Refused(f"resume={cfg.resume} goes on with the run as it was, and {was}: leave it out")
