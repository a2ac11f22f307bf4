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
from PIL import Image

from ssl_runner import cli

TINY = (
    "epochs=2 dataset.subset=200 batch_size=50 backbone.widths=[8,16] projector.width=16 projector.K=8"
    " probe.probes=[knn] probe.features=[backbone] device=cpu precision=fp32"
)


if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: one thread each, subprocesses included
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ssl_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable]:
    """Return a function that runs `ssl-run` in-process, with an empty working directory.

    ssl_run("loss=simclr epochs=1") -> (exit code, standard output, standard error)
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_RUNNER_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    hydra_config = HydraConfig.instance().cfg

    def run(command: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["ssl-run", *shlex.split(command)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    HydraConfig.instance().cfg = hydra_config


def run_folder(out: str) -> Path:
    """Return the run folder given by `run=` in the last line of standard output."""
    return Path(out.strip().splitlines()[-1].partition("run=")[2])


def make_pictures(root: Path, train: int, test: int, side: int) -> None:
    """Write side x side noise images of two brightnesses to root/{train,test}/{dark,light}.

    `train` and `test` are the numbers of images per class.
    """
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", train), ("test", test)):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(
                    100 * c, 100 * c + 100, (side, side, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
