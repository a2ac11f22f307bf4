"""`ssl-run`: validate the command line, then call run(cfg) for every job.

torch is imported only when a job runs, or in distributed runs. In a distributed run only rank 0 reads the
command line.
"""

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

FAILED: list[str] = []  # failed jobs of the sweep in this process


def main() -> None:
    """Entry point of `ssl-run`.

    Exit codes: 0 if all runs are done, 1 if the input is invalid or a run failed, 75 if the run was preempted
    and can be resumed, 130 if interrupted by Ctrl-C.
    """
    with Preemption():
        if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            from ssl_runner import distributed

            distributed.start()
            if not distributed.leads():
                follow()
                return
            lead(distributed.size())
            distributed.dismiss()  # no run to share, as with --help
        else:
            lead()


def lead(processes: int = 1) -> None:
    """Run the command line: the part of a single process, or of rank 0 of `processes`."""
    config.register_resolvers()
    config.prefer_our_presets()
    FAILED.clear()
    before = os.environ.get("HYDRA_FULL_ERROR")
    # makes Hydra raise exceptions instead of printing a traceback and exiting
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        prepare(processes)
        hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print("interrupted; resume=<folder of the run> resumes from its last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout closed it, as in `ssl-run --help | head`
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
        print(f"failed sweep jobs ({len(FAILED)}): {'; '.join(FAILED)}", file=sys.stderr)
        sys.exit(1)


def prepare(processes: int = 1) -> None:
    """Validate the command line before Hydra writes anything, and complete it for resume=<folder>.

    `processes` is the number of processes of a distributed run. Raises UsageError if any job cannot run.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise Refused(f"{message}; list the options with ssl-run --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args()
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    given = {override.key_or_group: override for override in config.parse(args.overrides)}
    config.check_plugins(given.values())
    auto = "resume" in given and given["resume"].value() == "auto"
    if (args.multirun or "hydra.mode" in given) and processes > 1:
        raise Refused(
            f"a sweep cannot run in {processes} processes, which together train one run;"
            " start it without torchrun or srun"
        )
    if "resume" in given and given["resume"].value() is not None and not auto:
        if args.multirun:
            raise Refused(
                f"{given['resume'].input_line}: expected a single run; leave out -m, or use resume=auto"
            )
        folder = Path(str(given["resume"].value())).resolve()
        place = sys.argv.index(str(given["resume"].input_line)) + 1
        sys.argv[place:place] = resumed(folder, given)  # argparse requires all overrides to be adjacent
        if args.config_dir is None:
            sys.argv += config_dir_of(folder)
        else:
            sys.argv += ["--config-dir", str(Path(args.config_dir).resolve())]
        args = parser.parse_args()
        # relative paths are resolved against the directory in which the run was started
        os.chdir(read_json(folder / "run.json")["cwd"])
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
    """Raise UsageError if the folder, or a direct subfolder, already contains a run."""
    for taken in (folder, *folder.glob("*")):
        if (taken / "run.json").exists():
            raise Refused(
                f"{taken} already contains a run: choose another folder, or resume it with resume={taken}"
            )


def job(cfg: DictConfig) -> float | None:
    """Execute one run, in the folder created by Hydra or in the one that `folder_of` returns.

    Returns the validation accuracy, which a sweeper may maximise, or None for a failed job of a sweep. In a
    distributed run, rank 0 makes all decisions and the other ranks execute `follow`.

    A failure is reported at once, on one line. A single run then exits; a sweep continues with its other
    jobs.
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
                print(f"already done: started {record['started']}, commit {record['git_commit']}", flush=True)
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
            else f" (traceback in {folder}/run.json)"
        )
        if hydra_config.mode == RunMode.RUN:
            print(said(error) + more, file=sys.stderr)
            sys.exit(1)
        name = f"#{hydra_config.job.num} ({hydra_config.job.override_dirname})"
        print(f"job {name}: {said(error)}{more}", file=sys.stderr, flush=True)
        if not hydra_config.launcher._target_.endswith("BasicLauncher"):
            raise  # a launcher in another process detects the failure only by this exception
        FAILED.append(name)
        return None
    distributed.finish()
    print(f"top1={result['top1']:.4f} loss={result['loss']:.6g} run={folder}", flush=True)
    return result["val_top1"]


def follow() -> float | None:
    """Execute the run that rank 0 broadcasts. Entry point of all other ranks.

    Returns the validation accuracy, or None if there was nothing to run.
    """
    from ssl_runner import distributed
    from ssl_runner.run import run

    try:
        result = {}
        if (task := distributed.share(None)) is not None:
            cfg, folder, cwd = task
            os.chdir(cwd)  # relative paths must resolve as on rank 0
            result = run(OmegaConf.create(cfg), Path(folder))
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:  # rank 0 prints the message
        sys.exit(distributed.failed(error)[0])
    return result.get("val_top1")


def folder_of(cfg: DictConfig, made: Path) -> Path:
    """Return the folder in which to execute a run, given the folder `made` by Hydra.

    With resume=auto this is the folder of the unfinished or finished run with the same identity, if there is
    one; otherwise it is `made`. Raises UsageError if the folder contains another run.
    """
    if cfg.resume is not None and cfg.resume != "auto":
        return made
    identity = config.identity(cfg)
    record = read_json(made / "run.json") if (made / "run.json").exists() else None
    if cfg.resume == "auto":
        matches = [path.parent for path in runs_beside(made) if identity_of(path) == identity]
        if matches:
            return max(
                matches,
                key=lambda folder: (
                    read_json(folder / "run.json")["status"] == "done",
                    folder.stat().st_mtime,
                ),
            )
        if record is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            return made.with_name(f"{made.name}-{identity[:8]}")  # an earlier sweep used this job number
    elif (
        record is not None
        and record.get("identity") == identity
        and record.get("slurm_job") == os.environ.get("SLURM_JOB_ID", "")
    ):
        return made  # this job was requeued by Slurm
    not_taken(made)
    return made


def identity_of(path: Path) -> str | None:
    """Return the identity in a run.json, or None if the file is corrupt, for example after a power cut."""
    try:
        return read_json(path).get("identity")
    except ValueError:
        return None


def runs_beside(made: Path) -> list[Path]:
    """Return the run.json paths of all runs that resume=auto considers.

    For a single run, these are the runs with the same data set and loss; for a sweep, the runs of all sweeps.
    If the command line sets hydra.run.dir or hydra.sweep.dir, only runs in that folder are considered.
    """
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
    """Lock the folder for the lifetime of the run. Raises UsageError if another process holds the lock."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise Refused(
            f"{folder} is in use by another process: wait for it, or choose another folder"
        ) from None


def describe(cfg: DictConfig, folder: Path) -> None:
    """Write .hydra/: the resolved configuration, the overrides, and Hydra's own configuration."""
    hydra_config = HydraConfig.get()
    (folder / ".hydra").mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    OmegaConf.save(hydra_config.overrides.task, folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(
        OmegaConf.create({"hydra": OmegaConf.to_container(hydra_config)}), folder / ".hydra" / "hydra.yaml"
    )


def said(error: Exception) -> str:
    """Format an error on one line.

    The exception type is prepended, unless ssl_runner defines the exception.
    """
    if type(error).__name__ == "UncompletedJobError":  # raised by submitit; its message contains a whole log
        match = re.search(r"Job (\S+)", str(error))
        return (
            f"sweep job {match[1] if match else ''} ended without a result (killed or cancelled): see its log"
            " in .submitit/ in the sweep folder. Other jobs keep running; when they have ended, rerun the"
            " command with resume=auto to run only the missing jobs"
        )
    from_us = isinstance(error, Refused) or type(error).__module__.startswith("ssl_runner")
    return config.one_line(error) if from_us else f"{type(error).__name__}: {config.one_line(error)}"


def resumed(folder: Path, given: dict[str, Override]) -> list[str]:
    """Return the overrides to add for resume=<folder>.

    These are the overrides that the run was started with, without those in `given` on the command line, and
    the folder of the run as hydra.run.dir. Raises UsageError if the folder has no run that can be resumed.
    """
    if not (folder / "run.json").is_file() or not (folder / ".hydra" / "overrides.yaml").is_file():
        raise Refused(
            f"resume={folder}: expected the folder of a run; give one that contains run.json and .hydra"
        )
    record = read_json(folder / "run.json")
    not_done(folder)
    if not Path(record["cwd"]).is_dir():
        raise Refused(
            f"resume={folder}: the working directory of the run, {record['cwd']}, no longer exists;"
            " recreate it, or start a new run"
        )
    if record["status"] == "running" and alive(record):
        raise Refused(
            f"resume={folder}: this run is still running as process {record['pid']}; wait for it to end"
        )
    first = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    added = [
        str(o.input_line) for o in config.parse([str(line) for line in first]) if o.key_or_group not in given
    ]
    quoted = str(folder).replace("'", "\\'")
    return [*added, f"hydra.run.dir='{quoted}'"]


def not_done(folder: Path) -> None:
    """Raise UsageError if the run is done."""
    if read_json(folder / "run.json")["status"] == "done":
        raise Refused(f"resume={folder}: this run is done; start a new run to change options")


def config_dir_of(folder: Path) -> list[str]:
    """Return the --config-dir that a run was started with, as command-line arguments."""
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    paths = [str(source.path) for source in sources if source.provider == "command-line"]
    return ["--config-dir", paths[0]] if paths else []


def alive(record: dict) -> bool:
    """Return whether the process that wrote run.json is still running. Always False for another host."""
    if record["host"] != socket.gethostname() or not psutil.pid_exists(record["pid"]):
        return False
    return abs(psutil.Process(record["pid"]).create_time() - record["process_started"]) < 1


def unchanged(cfg: DictConfig, folder: Path) -> None:
    """Raise UsageError if `cfg` differs from the saved configuration of the run, apart from `resume`."""
    saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(saved, DictConfig)
    for key in dict.fromkeys([*config.dotted_keys(saved), *config.dotted_keys(cfg)]):
        then, now = OmegaConf.select(saved, key), OmegaConf.select(cfg, key)
        if then != now and key != "resume":
            change = f"{key} ({config.shown(then)} -> {config.shown(now)})"
            raise Refused(f"Cannot change {change} when resuming: leave it out, or start a new run")
