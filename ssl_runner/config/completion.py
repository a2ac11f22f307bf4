"""Shell completion of groups, choices and options: `ssl-run -sc install=bash`, answered by Hydra."""

import argparse
import contextlib
import io
import os
import re
from collections.abc import Callable

from ssl_runner.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def complete(args: argparse.Namespace, run_hydra: Callable[[], None]) -> None:
    """Print the script that installs or removes completion, or the words that continue COMP_LINE.

    `run_hydra` does what `args` asks for. A line or a config that Hydra cannot read has no continuation: a
    message would disturb the prompt. Raises UsageError for other arguments.
    """
    given = " ".join(args.overrides)
    command, _, shell = given.partition("=")
    if command not in ("install", "uninstall", "query") or shell not in SHELLS:
        raise UsageError(
            f"--shell-completion {given}: expected install=<shell> or uninstall=<shell>; use one of"
            f" {', '.join(SHELLS)}"
        )
    if command != "query":
        run_hydra()
        return
    if folder := re.search(r"\s(?:--config-dir|-cd)[=\s]\s*(\S+)\s", os.environ.get("COMP_LINE", "")):
        args.config_dir = folder[1]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception, SystemExit):
        run_hydra()
