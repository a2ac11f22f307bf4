"""Exit codes and one-line errors of the console scripts."""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

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
    except BrokenPipeError:
        exit_without_stdout()
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(format_error(error), file=sys.stderr)
        sys.exit(1)


def exit_without_stdout() -> NoReturn:
    """Exit with 1 after the reader of stdout has closed it, as in `ssl-run --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
