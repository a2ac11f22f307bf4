"""`ssl-run`: validate the command line, then call run(cfg) for every job.

torch is imported only when a job runs, or in distributed runs. In a distributed run only rank 0 reads the
command line.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ssl_runner import console
from ssl_runner.config import arguments, check, completion, compose, grid, hydra_internals, paths, sweeps
from ssl_runner.config.help import help_text
from ssl_runner.errors import UsageError, counted, format_error
from ssl_runner.preemption import EXIT, Preempted, Preemption
from ssl_runner.runs import resume, saved, schedule, start
from ssl_runner.runs.run_json import read_record
from ssl_runner.version import describe_versions


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
    """Execute the command line: the part of a single process, or of rank 0 of `processes`."""
    failed: list[hydra_internals.JobReturn] = []  # jobs of a sweep
    try:
        console.call(
            partial(execute, processes, failed),
            interrupted="interrupted; resume=auto resumes a run that has begun",
        )
    except Preempted as error:
        if not error.reported:  # before the first run, between those of a sweep, or while others run them
            by = str(error).partition(";")[0]
            print(f"{by}; repeat the command (resume=auto resumes runs that have begun)", file=sys.stderr)
        raise
    if failed:
        print(f"failed sweep jobs ({len(failed)}): {'; '.join(map(sweeps.failure, failed))}", file=sys.stderr)
        sys.exit(1)


def execute(processes: int, failed: list[hydra_internals.JobReturn]) -> None:
    """Parse and validate the command line, then do what it asks for. Failed jobs go to `failed`."""
    parser = arguments.parser()
    args = arguments.parse(parser)
    if args.version:
        print(describe_versions())
        return
    compose.register_resolvers()
    compose.prefer_our_presets()
    if args.help:
        print(help_text(args), flush=True)
        return
    if args.shell_completion:
        completion.complete(args, partial(hydra_internals.run_hydra, args, parser, job, compose.CONF))
        return
    count = 0  # of the jobs of a grid
    if not (args.hydra_help or args.info):
        jobs = prepare(args, processes)
        if args.multirun and args.cfg == "job":
            sweeps.print_jobs(compose.parse(args.overrides), [overrides for overrides, _ in jobs])
            return
        if args.multirun and not args.cfg:
            count = 0 if build_jobs(args, jobs) else len(jobs)
    if count:
        print(f"sweep: {counted(count, 'job')}", flush=True)
    before: list[hydra_internals.JobReturn] = []
    task = partial(job, kept=start.existing(args.overrides))
    with hydra_internals.collected_failures(failed, before):
        hydra_internals.run_hydra(args, parser, task, compose.CONF)
    if before and args.multirun:  # a search has no count
        number = f"{len(before)} of {count}" if count else str(len(before))
        print(f"jobs done before: {number}", flush=True)
    if count and not failed:
        print("all jobs are done", flush=True)


def prepare(args: argparse.Namespace, processes: int) -> list[tuple[str, DictConfig]]:
    """Validate the command line before Hydra writes anything, and complete it for resume=<folder>.

    Sets `args.multirun` if the experiment has a sweep (`hydra.sweeper.params`) with an axis of several values
    that the command line leaves open. Axes of one value become overrides.

    `processes` is the number of processes of a distributed run. Returns the overrides and the configuration
    of every job. Raises UsageError if one of them cannot run.
    """
    overrides = compose.parse(args.overrides)
    given = {override.key_or_group: override for override in overrides}
    if sum(override.key_or_group == "resume" for override in overrides) > 1:
        raise UsageError("resume is given twice: expected one resume=<folder> or resume=auto; leave one out")
    sweeps.check_plugins(str(override.input_line) for override in overrides)
    resume_from = given["resume"].value() if "resume" in given else None
    own = resume_from in (None, "auto") and args.cfg in (None, "job")  # Hydra prints its own configuration
    axes = grid.open_axes(args) if own else []
    if not args.multirun:
        args.multirun = any(axis.is_sweep_override() for axis in axes)
        if not args.multirun:
            args.overrides = [*(str(axis.input_line) for axis in axes), *args.overrides]
    if args.multirun and processes > 1:
        raise UsageError(
            f"a sweep cannot run in {processes} processes, which together train one run;"
            " start it without torchrun or srun"
        )
    if resume_from is None and not args.cfg:
        for key in ("hydra.run.dir", "hydra.sweep.dir"):
            if key in given:
                folder = paths.unquoted(str(given[key].value()))
                resume.check_creatable(key, folder)
                resume.refuse_occupied(folder)
    elif resume_from not in (None, "auto"):
        if args.multirun:
            raise UsageError(
                f"{given['resume'].input_line}: expected a single run; leave out -m, or use resume=auto"
            )
        if given["resume"].is_sweep_override():
            raise paths.sweep(str(given["resume"].input_line))
        folder = paths.unquoted(str(resume_from)).expanduser().resolve()
        plan = resume.plan_resume(folder, given, args.config_dir)
        args.overrides.remove(str(given["resume"].input_line))
        args.overrides += [f"resume={paths.quote(folder)}", *plan.overrides]
        args.config_dir = plan.config_dir
        os.chdir(plan.directory)
    jobs = check.check(args)
    if not args.multirun and not args.cfg:
        sweeps.check_single(overrides)
    if args.multirun:
        args.overrides += sweeps.short_names([*axes, *overrides])
    return jobs


def build_jobs(args: argparse.Namespace, jobs: list[tuple[str, DictConfig]]) -> bool:
    """Build every job of a sweep on this machine. Raises UsageError for the first that cannot run.

    Returns whether it is a search, whose jobs are not known in advance.
    """
    environment, search = grid.sweep_settings(args)
    if not any(line.lstrip("+").startswith("hydra/launcher") for line in args.overrides):
        from ssl_runner.build import check_jobs

        os.environ.update(environment)
        check_jobs(jobs, search)
    return search


def job(cfg: DictConfig, kept: Collection[Path]) -> hydra_internals.Returned | None:
    """Execute one run. The lines of jobs that run at the same time begin with their numbers."""
    hydra_config = HydraConfig.get()
    parallel = "joblib" in hydra_config.launcher._target_ and hydra_config.mode == RunMode.MULTIRUN
    with console.numbered(f"#{hydra_config.job.num}: ") if parallel else nullcontext():
        return run_job(cfg, kept)


def run_job(cfg: DictConfig, kept: Collection[Path]) -> hydra_internals.Returned | None:
    """Execute one run, in the folder that `start.opened` chooses. The folders `kept` are not removed.

    Returns the validation accuracy, which a sweeper may maximise. In a distributed run, rank 0 makes all
    decisions and the other ranks execute `run_as_follower`, and return None.

    A failure is reported at once, on one line. A single run then exits; a job of a sweep raises its error,
    which Hydra keeps for `collected_failures`.
    """
    with start.undone_on_error(kept):  # the import of torch takes seconds
        from ssl_runner import distributed

        distributed.start()
    if not distributed.is_main_process():
        run_as_follower()
        return None
    hydra_config, folder = HydraConfig.get(), hydra_internals.output_dir()
    try:
        if hydra_config.mode == RunMode.MULTIRUN:
            with start.undone_on_error(kept):
                print(f"job {sweeps.job_name(hydra_config)}", flush=True)
        with start.opened(cfg, kept) as (cfg, folder, abandon):
            result = run_or_skip(cfg, folder, abandon)
        distributed.finish()
        top1 = "" if result["top1"] is None else f"top1={result['top1']:.4f} "
        print(f"{top1}loss={result['loss']:.6g} run={folder}", flush=True)
    except Preempted as error:
        code, cause = distributed.report_failure(error)
        if cause != str(error) and code != EXIT:  # torchrun ends the other ranks when one has failed
            print(cause, file=sys.stderr, flush=True)
            sys.exit(code)
        print(stopped_line(str(error), folder), file=sys.stderr, flush=True)
        error.reported = True
        raise
    except KeyboardInterrupt as error:  # printed by `console.call`
        error.args = (stopped_line("interrupted; the run can be resumed", folder),)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            console.exit_if_stdout_is_closed()
        distributed.report_failure(error)
        more = ""
        if not isinstance(error, UsageError):
            if (folder / "run.json").exists():
                more = f" (traceback in {folder}/run.json)"
            else:
                traceback.print_exception(error)
        line = format_error(error) + more
        if hydra_config.mode == RunMode.RUN:
            print(line, file=sys.stderr)
            sys.exit(1)
        print(f"job {sweeps.job_name(hydra_config)}: {line}", file=sys.stderr, flush=True)
        raise
    return hydra_internals.Returned(result["val_top1"], "status" in result)  # in the record of an earlier run


def stopped_line(message: str, folder: Path) -> str:
    """Return the line for "<reason>; the run can be resumed": it may not have begun, or be done."""
    by = message.partition(";")[0]
    if not (folder / "run.json").exists():
        return f"{by} before the run began; repeat the command"
    if read_record(folder / "run.json")["status"] == "done":
        return f"{by} after the end of the run; run={folder}"
    return f"{message}: {paths.override('resume', folder)}, or the same command with resume=auto"


def run_or_skip(cfg: DictConfig, folder: Path, abandon: Callable[[], None] | None) -> dict[str, float | None]:
    """Start or resume the run in a locked folder, on all ranks. Returns its result.

    `abandon` removes the folder if a new run ends before training. A run that is done is not repeated. Raises
    UsageError if it cannot be resumed with this configuration.
    """
    from ssl_runner import distributed

    record = read_record(folder / "run.json") if (folder / "run.json").exists() else None
    if record is not None and record["status"] == "done" and cfg.resume in (None, "auto"):
        distributed.release_ranks()
        for field in ("started", "git_commit", "loss", "top1", "val_top1"):
            if field not in record:
                raise UsageError(
                    f"{folder}/run.json: expected {field} of a finished run, found none; restore the file, or"
                    " start a new run in another folder"
                )
        commit = f", commit {record['git_commit']}" if record["git_commit"] else ""  # installed from a wheel
        print(f"already done: started {record['started']}{commit}", flush=True)
        return record
    if record is None:
        resume.write_hydra_files(cfg, folder)
    elif schedule.is_extension(cfg, folder):
        cfg = schedule.extend(cfg, folder)
    else:
        resume.refuse_finished(folder)
        cfg = saved.resumed(cfg, folder)
    at_begin = None if record is None else partial(saved.keep_given, cfg, folder)
    hydra = HydraConfig.get()
    places = hydra_internals.launch_folder(), hydra_internals.config_sources(hydra).get("command-line")
    compose.find_modules(*places)
    environment = hydra_internals.environment(hydra)
    distributed.broadcast_object(
        (OmegaConf.to_container(cfg), str(folder), str(Path.cwd()), places, environment)
    )
    from ssl_runner.pipeline import run

    return run(cfg, folder, at_begin, abandon)


def run_as_follower() -> None:
    """Execute the run that rank 0 broadcasts, if there is one. Entry point of all other ranks."""
    from ssl_runner import distributed

    try:
        if (task := distributed.broadcast_object(None)) is not None:
            cfg, folder, cwd, places, environment = task
            os.environ.update(environment)
            os.chdir(cwd)  # relative paths must resolve as on rank 0
            compose.find_modules(*places)
            from ssl_runner.pipeline import run

            run(OmegaConf.create(cfg), Path(folder))
        distributed.finish()
    except (Exception, Preempted, KeyboardInterrupt) as error:  # rank 0 prints the message
        sys.exit(distributed.report_failure(error)[0])
