"""`ssl-run`: from the command line to run(cfg), with refusals that a person can read. Imports torch only when a job runs."""

import argparse
import os
import socket
import sys
from pathlib import Path

import hydra
import psutil
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ssl_runner import config
from ssl_runner.errors import Refused
from ssl_runner.metrics import read_json


def main() -> None:
    """The console script. Exits with 0 when every run is done, 1 when one was refused or failed, 130 when interrupted."""
    config.register_resolvers()
    parser = get_args_parser()
    args = parser.parse_args()
    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what went wrong instead of printing a traceback and leaving
    try:
        if not (args.help or args.hydra_help or args.info or args.shell_completion):
            sys.argv[1:] += resumed(args)
            args = parser.parse_args()
            config.check(args)
        hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as in `ssl-run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debugging:
            raise
        if not getattr(error, "told", False):
            print(said(error), file=sys.stderr)
        sys.exit(1)


def job(cfg: DictConfig) -> float:
    """One run, in the folder that Hydra made for it; returns the validation accuracy, which a sweeper may maximise.

    A failure is told in one line at once. A single run ends there; in a sweep the other jobs go on.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        OmegaConf.resolve(cfg)
        if cfg.resume is None:
            OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")  # Hydra's own copy is not resolved
        else:
            unchanged(cfg, folder)
        from ssl_runner.run import run

        result = run(cfg, folder)
    except Exception as error:
        where = "" if isinstance(error, Refused) or not (folder / "run.json").exists() else f" (more in {folder}/run.json)"
        if os.environ.get("SSL_RUNNER_TRACEBACK") == "1":
            raise
        print(said(error) + where, file=sys.stderr, flush=True)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(1)
        error.told = True  # type: ignore[attr-defined]
        raise
    print(f"top1={result['top1']:.4f} loss={result['loss']:.6g} run={folder}", flush=True)
    return result["val_top1"]


def said(error: Exception) -> str:
    """What to tell of an error, on one line: the message where it was written for the user, else also its type."""
    from_us = isinstance(error, Refused) or type(error).__module__.startswith("ssl_runner")
    return config.one_line(error) if from_us else f"{type(error).__name__}: {config.one_line(error)}"


def resumed(args: argparse.Namespace) -> list[str]:
    """The arguments to add for `resume=<folder>`: the overrides that the run was started with (those on the command line win),
    its folder, and its --config-dir. Refused when there is no run to go on with."""
    given = {override.key_or_group: override for override in config.parse(args.overrides)}
    if "resume" not in given or given["resume"].value() is None:
        return []
    folder = Path(str(given["resume"].value())).resolve()
    if args.multirun:
        raise Refused(f"resume={folder} continues one run: leave out -m")
    if not (folder / "run.json").is_file() or not (folder / ".hydra" / "overrides.yaml").is_file():
        raise Refused(f"resume={folder} is not the folder of a run: give one that holds run.json and .hydra")
    record = read_json(folder / "run.json")
    if record["status"] == "done":
        raise Refused(f"resume={folder}: this run is done; start a new one to train differently")
    if record["status"] == "running" and alive(record):
        raise Refused(f"resume={folder}: this run is still running, as process {record['pid']}")
    first = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    added = [str(o.input_line) for o in config.parse([str(line) for line in first]) if o.key_or_group not in given]
    added += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    return added + (["--config-dir", folders[0]] if folders and args.config_dir is None else [])


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
            raise Refused(f"resume={cfg.resume} goes on with the run as it was, and {key} was {then}, not {now}: leave it out")
