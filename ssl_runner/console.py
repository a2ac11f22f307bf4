"""Arguments, exit codes and one-line errors of the console scripts, and the lines of parallel jobs."""

import argparse
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from typing import Any, NoReturn, TextIO

from ssl_runner.errors import UsageError, format_error

MESSAGES = {  # of argparse -> ours, one after the other
    r"the following arguments are required: ": "expected ",
    r"argument (?:\S+/)?(--[\w-]+)(?:/\S+)?: ": r"\1: ",
    r": invalid int value: '(.*)'": r"=\1: expected an integer",
    r": invalid choice: '(.*)' \(choose from (.*)\)": r"=\1: expected one of \2",
    r": ignored explicit argument '(.*)'": r"=\1: expected no value",
    r": expected (?:at least )?one argument": ": expected a value",
}


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UsageErrors. The lines of its description and epilog are kept."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def read(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `words`, by default those of sys.argv. Raises UsageError for an unknown option."""
        words = sys.argv[1:] if words is None else list(words)
        args, unknown = self.parse_known_intermixed_args(words)
        lists = [value for value in vars(args).values() if isinstance(value, list)]
        unknown += [word for value in lists for word in map(str, value) if word.startswith("-")]
        for word in unknown:
            near = self.instead(word, words[words.index(word) + 1 :] if word in words else [])
            todo = f"write {near}, or list" if near else "list"
            raise UsageError(
                f"{word}: expected an option of {self.prog}; {todo} the options with {self.prog} --help"
            )
        return args

    def instead(self, word: str, following: Sequence[str]) -> str:
        """What to write for an unknown option before the words `following`: the option with nearly this name,
        or ""."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        return "".join(get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.75))

    def error(self, message: str) -> NoReturn:
        for pattern, ours in MESSAGES.items():
            message = re.sub(pattern, ours, message)
        raise UsageError(f"{message}; list the options with {self.prog} --help")


def call(command: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Execute a command. An error is printed on one line, with exit code 1.

    Ctrl-C prints the message of its exception, or the line `interrupted`, and exits with 130.
    HYDRA_FULL_ERROR=1 raises errors as they are.
    Characters of a path that the encoding of the terminal lacks are printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except KeyboardInterrupt as error:
        print(str(error) or interrupted, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            exit_if_stdout_is_closed()
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(format_error(error), file=sys.stderr)
        sys.exit(1)


class Numbered(io.TextIOBase):
    """Text stream that writes whole lines to another stream, each after `prefix` unless it names its job.

    Of a line that is overwritten, as by a progress bar, only the last text is written.
    """

    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self.prefix, self.line = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).replace("\r\n", "\n").split("\n")
        self.line = self.line[self.line.rfind("\r", 0, -1) + 1 :]
        if lines:
            last = [line.rpartition("\r")[2] for line in lines]
            named = [line if line.startswith("job #") else self.prefix + line for line in last]
            self.stream.write("".join(f"{line}\n" for line in named))  # at once, between those of other jobs
            self.stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def numbered(prefix: str) -> Iterator[None]:
    """Context manager in which lines of stdout and stderr begin with `prefix`."""
    streams = Numbered(sys.stdout, prefix), Numbered(sys.stderr, prefix)
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.write("\n" if stream.line.strip() else "")


def exit_if_stdout_is_closed() -> None:
    """Exit with 1 if the reader of stdout has closed it, as in `ssl-run --help | head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors only
    if poll.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
