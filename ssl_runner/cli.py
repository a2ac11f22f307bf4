"""`ssl-run`: validate the command line, then call run(cfg) for every job.

torch is imported only when a job runs, or in distributed runs. In a distributed run only rank 0 reads the
command line.
"""

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ssl_runner import distributed
from ssl_runner.config import compose, rules
from ssl_runner.errors import UsageError
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.run import run
from ssl_runner.runs.files import read_json
from ssl_runner.runs.resume import (
    config_dir_of,
    folder_of,
    lock_folder,
    refuse_changes,
    refuse_finished,
    refuse_occupied,
    resume_overrides,
    write_hydra_files,
)

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
            if not distributed.is_main_process():
                run_as_follower()
                return
            run_as_main(distributed.world_size())
            distributed.release_ranks()  # no run to share, as with --help
        else:
            run_as_main()


def run_as_main(processes: int = 1) -> None:
    """Run the command line: the part of a single process, or of rank 0 of `processes`."""
    compose.register_resolvers()
    compose.prefer_our_presets()
    FAILED.clear()
    before = os.environ.get("HYDRA_FULL_ERROR")
    # makes Hydra raise exceptions instead of printing a traceback and exiting
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        prepare(processes)
        hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print("interrupted; resume=<folder of the run> resumes from its last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout closed it, as in `ssl-run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if before == "1":
            raise
        print(format_error(error), file=sys.stderr)
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
        raise UsageError(f"{message}; list the options with ssl-run --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args()
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    given = {override.key_or_group: override for override in compose.parse(args.overrides)}
    compose.check_plugins(given.values())
    auto = "resume" in given and given["resume"].value() == "auto"
    if (args.multirun or "hydra.mode" in given) and processes > 1:
        raise UsageError(
            f"a sweep cannot run in {processes} processes, which together train one run;"
            " start it without torchrun or srun"
        )
    if "resume" in given and given["resume"].value() is not None and not auto:
        if args.multirun:
            raise UsageError(
                f"{given['resume'].input_line}: expected a single run; leave out -m, or use resume=auto"
            )
        folder = Path(str(given["resume"].value())).resolve()
        place = sys.argv.index(str(given["resume"].input_line)) + 1
        sys.argv[place:place] = resume_overrides(
            folder, given
        )  # argparse requires all overrides to be adjacent
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
                refuse_occupied(Path(str(given[key].value())))
    jobs = compose.check(args)
    if (
        (args.multirun or "hydra.mode" in given)
        and not args.cfg
        and not any(key.startswith("hydra/launcher") for key in given)
    ):
        from ssl_runner.run import check_jobs

        check_jobs(jobs)


def job(cfg: DictConfig) -> float | None:
    """Execute one run, in the folder created by Hydra or in the one that `folder_of` returns.

    Returns the validation accuracy, which a sweeper may maximise, or None for a failed job of a sweep. In a
    distributed run, rank 0 makes all decisions and the other ranks execute `follow`.

    A failure is reported at once, on one line. A single run then exits; a sweep continues with its other
    jobs.
    """

    distributed.start()
    if not distributed.is_main_process():
        return run_as_follower()
    hydra_config = HydraConfig.get()
    made = folder = Path(hydra_config.runtime.output_dir)
    try:
        OmegaConf.resolve(cfg)
        folder = folder_of(cfg, made)
        if folder != made and not any(made.iterdir()):
            made.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            record = read_json(folder / "run.json") if (folder / "run.json").exists() else None
            if record is not None and record["status"] == "done" and cfg.resume in (None, "auto"):
                distributed.release_ranks()
                print(f"already done: started {record['started']}, commit {record['git_commit']}", flush=True)
                result = record
            else:
                if record is None:
                    write_hydra_files(cfg, folder)
                else:
                    refuse_finished(folder)
                    refuse_changes(cfg, folder)
                distributed.broadcast_object((OmegaConf.to_container(cfg), str(folder), str(Path.cwd())))
                from ssl_runner.run import run

                result = run(cfg, folder)
    except Preempted as error:
        distributed.report_failure(error)
        print(f"{error}: resume={folder}, or the same command with resume=auto", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        distributed.report_failure(error)
        more = (
            ""
            if isinstance(error, UsageError) or not (folder / "run.json").exists()
            else f" (traceback in {folder}/run.json)"
        )
        if hydra_config.mode == RunMode.RUN:
            print(format_error(error) + more, file=sys.stderr)
            sys.exit(1)
        name = f"#{hydra_config.job.num} ({hydra_config.job.override_dirname})"
        print(f"job {name}: {format_error(error)}{more}", file=sys.stderr, flush=True)
        if not hydra_config.launcher._target_.endswith("BasicLauncher"):
            raise  # a launcher in another process detects the failure only by this exception
        FAILED.append(name)
        return None
    distributed.finish()
    print(f"top1={result['top1']:.4f} loss={result['loss']:.6g} run={folder}", flush=True)
    return result["val_top1"]


def run_as_follower() -> float | None:
    """Execute the run that rank 0 broadcasts. Entry point of all other ranks.

    Returns the validation accuracy, or None if there was nothing to run.
    """

    try:
        result = {}
        if (task := distributed.broadcast_object(None)) is not None:
            cfg, folder, cwd = task
            os.chdir(cwd)  # relative paths must resolve as on rank 0
            result = run(OmegaConf.create(cfg), Path(folder))
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:  # rank 0 prints the message
        sys.exit(distributed.report_failure(error)[0])
    return result.get("val_top1")


def format_error(error: Exception) -> str:
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
    from_us = isinstance(error, UsageError) or type(error).__module__.startswith("ssl_runner")
    return rules.one_line(error) if from_us else f"{type(error).__name__}: {rules.one_line(error)}"
