"""Versions of the package, of torch, and of the checkout. Does not import torch."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from ssl_runner import __version__


def describe_versions() -> str:
    """Return the versions of ssl_runner and torch, and the git commit if there is one, on one line."""
    commit = git_commit()
    parts = [
        f"ssl_runner {__version__}",
        f"torch {version('torch')}",
        *([f"commit {commit}"] if commit else []),
    ]
    return ", ".join(parts)


def git_commit() -> str | None:
    """Return the git commit of this package, with the suffix "-dirty" if there are uncommitted changes.

    Returns None if the package does not run from a checkout or git is not installed.
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return (
        subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()
        or None
    )
