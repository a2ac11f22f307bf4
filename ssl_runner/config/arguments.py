"""The arguments of `ssl-run`: overrides and options, in Hydra's grammar."""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ssl_runner.config import paths
from ssl_runner.errors import UsageError

MESSAGES = {  # of argparse -> ours, one after the other
    r"the following arguments are required: ": "expected ",
    r"argument (?:\S+/)?(--[\w-]+)(?:/\S+)?: ": r"\1: ",
    r": invalid int value: '(.*)'": r"=\1: expected an integer",
    r": invalid choice: '(.*)' \(choose from (.*)\)": r"=\1: expected one of \2",
    r": ignored explicit argument '(.*)'": r"=\1: expected no value",
    r": expected (?:at least )?one argument": ": expected a value",
}
OVERRIDES = ("overrides", "source")  # destinations of the words that may be overrides


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UsageErrors. Paths in overrides are quoted as `paths.complete` describes.

    The lines of its description and epilog are printed as they are.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def read(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `words`, by default those of sys.argv. Overrides and options may be given in any order."""
        words = sys.argv[1:] if words is None else list(words)
        args, unknown = self.parse_known_intermixed_args(words)
        given = {name: getattr(args, name) for name in OVERRIDES if name in args}
        if unknown := [*unknown, *(word for line in given.values() for word in line if word.startswith("-"))]:
            raise UsageError(
                f"{unknown[0]}: expected an option of {self.prog}; {self.instead(unknown[0], words)}list the"
                f" options with {self.prog} --help"
            )
        for name, lines in given.items():
            setattr(args, name, paths.complete(lines, getattr(args, "multirun", False)))
        return args

    def instead(self, word: str, words: Sequence[str]) -> str:
        """What to write for an unknown option, or "": the option of this name but for a few letters, or the
        override batch_size=8 for --batch-size=8 and for --batch-size 8."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        if near := get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.75):
            return f"write {near[0]}, or "
        if not any(action.dest in OVERRIDES for action in self._actions):
            return ""
        name, equals, value = word.lstrip("-").partition("=")
        following = words[words.index(word) + 1 : words.index(word) + 2] if word in words else []
        if not equals and following and not re.match(r"-(?![\d.])|[+~]?\w[\w.@/]*=", following[0]):
            equals, value = "=", following[0]
        name = name.replace("-", "_")
        return f"write {paths.in_shell(f'{name}={value}')}, or " if equals else ""

    def error(self, message: str) -> NoReturn:
        for pattern, ours in MESSAGES.items():
            message = re.sub(pattern, ours, message)
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
