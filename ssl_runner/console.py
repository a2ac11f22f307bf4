"""Exit codes and one-line errors of the console scripts, and the lines of parallel jobs."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from ssl_runner.errors import format_error


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
    except BrokenPipeError:  # the reader of stdout closed it, as in `ssl-run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(format_error(error), file=sys.stderr)
        sys.exit(1)


class Numbered(io.TextIOBase):
    """Text stream that writes whole lines to another stream, each after `prefix` unless it names its job."""

    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self.prefix, self.line = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        if lines:
            named = [line if line.startswith("job #") else self.prefix + line for line in lines]
            self.stream.write("".join(f"{line}\n" for line in named))  # at once, between those of other jobs
            self.stream.flush()
        return len(text)


@contextmanager
def numbered(prefix: str) -> Iterator[None]:
    """Context manager in which lines of stdout and stderr begin with `prefix`."""
    streams = Numbered(sys.stdout, prefix), Numbered(sys.stderr, prefix)
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.write("\n" if stream.line else "")
