"""Shared fixtures and helpers: a tiny run configuration and the command line as a user calls it."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from ssl_runner import cli
from ssl_runner.views import Augment
from tests import composition
from tests.helpers import run_script

composition.install()

# compile the modules of the repository once, not in every worker and subprocess
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: one thread each, subprocesses included
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # before CUDA is used, for deterministic runs on it


def pytest_sessionstart() -> None:
    """Compile the kernels of views before the first test, which otherwise announces it on standard error."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        Augment({"all": {}})(images, 2, torch.zeros(3), torch.ones(3), torch.Generator())


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder for downloads and caches."""
    monkeypatch.setenv("SSL_RUNNER_DATA", str(tmp_path / "data"))


@pytest.fixture
def ssl_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable]:
    """Return a function that runs `ssl-run` in-process, with an empty working directory.

    ssl_run("loss=simclr epochs=1") -> (exit code, standard output, standard error)
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    hydra_config = HydraConfig.instance().cfg

    def run(command: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        return run_script(cli.main, shlex.split(command), monkeypatch, capsys)

    yield run
    HydraConfig.instance().cfg = hydra_config


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a run that the tests of a module share. It does not exist until the run is made."""
    return tmp_path_factory.mktemp("cached") / "run"
