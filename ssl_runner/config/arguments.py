"""The arguments of `ssl-run`: overrides and options, in Hydra's grammar."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ssl_runner import console
from ssl_runner.config import paths

OVERRIDES = ("overrides", "source")  # destinations of the words that may be overrides


class Parser(console.Parser):
    """Parser of options and overrides. Paths in overrides are quoted as `paths.complete` describes."""

    def read(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `words`, by default those of sys.argv. Overrides and options may be given in any order."""
        args = super().read(words)
        for name in OVERRIDES:
            if name in args:
                lines = paths.complete(getattr(args, name), getattr(args, "multirun", False))
                setattr(args, name, lines)
        return args

    def instead(self, word: str, following: Sequence[str]) -> str:
        """The option with nearly this name, or the override batch_size=8 for --batch-size=8 and for
        --batch-size 8."""
        name, equals, value = word.lstrip("-").partition("=")
        if not equals and following and not re.match(r"-(?![\d.])|[+~]?\w[\w.@/]*=", following[0]):
            equals, value = "=", following[0]
        name = name.replace("-", "_")
        return super().instead(word, following) or (paths.in_shell(f"{name}={value}") if equals else "")


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
    """Parse the words of `ssl-run`, by default those of sys.argv.

    `hydra.mode=MULTIRUN` sets `multirun`. The + of `+experiment=<name>` is dropped: the group is in the
    defaults list, where Hydra refuses it. Raises UsageError for an unknown option.
    """
    args = parser.read(words)
    if args.config_path is not None:
        args.config_path = str(Path(args.config_path).resolve())  # Hydra would start from a module's folder
    args.multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    args.overrides = [
        line.lstrip("+") if line.lstrip("+").startswith("experiment=") else line for line in args.overrides
    ]
    return args
