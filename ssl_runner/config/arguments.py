"""The arguments of `ssl-run`: overrides and options, in Hydra's grammar."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ssl_runner.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; list the options with {self.prog} --help")


def parser() -> Parser:
    """Return the parser. Its options are those of `hydra.main` that concern a user of ssl-run.

    Hydra's own parser is not used: Python 3.14 rejects one of its help texts, and its --version is Hydra's.
    """
    parser = Parser(prog="ssl-run", add_help=False)
    parser.add_argument("overrides", nargs="*", help="group=choice and key=value")
    parser.add_argument("--help", "-h", action="store_true", help="show groups and settings")
    parser.add_argument("--version", action="store_true", help="show the versions of ssl_runner and torch")
    parser.add_argument("--multirun", "-m", action="store_true", help="run a sweep")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"], help="show the configuration")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: resolve interpolations")
    parser.add_argument("--package", "-p", help="with --cfg: show one node only")
    parser.add_argument("--config-dir", "-cd", help="a folder with configs of your own")
    parser.add_argument("--config-path", "-cp", help="a folder to use instead of conf/")
    parser.add_argument("--config-name", "-cn", help="the config to start from, without .yaml")
    parser.add_argument("--hydra-help", action="store_true", help="show Hydra's help")
    parser.add_argument(
        "--info",
        "-i",
        nargs="?",
        const="all",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
        help="show information about Hydra",
    )
    parser.add_argument("--shell-completion", "-sc", action="store_true", help="install shell completion")
    parser.set_defaults(run=False)  # read by Hydra
    return parser


def parse(parser: Parser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `words`, by default those of sys.argv. Overrides and options may be given in any order.

    `hydra.mode=MULTIRUN` sets `multirun`. The + of `+experiment=<name>` is dropped: the group is in the
    defaults list, where Hydra refuses it. Raises UsageError for an unknown option.
    """
    args = parser.parse_intermixed_args(words)
    if args.config_path is not None:
        args.config_path = str(Path(args.config_path).resolve())  # Hydra would start from a module's folder
    args.multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    args.overrides = [
        line.lstrip("+") if line.lstrip("+").startswith("experiment=") else line for line in args.overrides
    ]
    return args
