"""The experiments of conf/: their grids, the commands of their headers, and the published recipes."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ssl_runner.config.compose import CONF
from tests.helpers import TINY


def header_commands() -> list[str]:
    """The commands in the headers of the experiments, with the loops of bash unrolled."""
    found = []
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        header = file.read_text().partition("\ndefaults:")[0].replace(" \\\n#", "")
        losses = re.findall(r'^#   for loss in "(.*)"; do', header, flags=re.M)
        for call in re.findall(r"^# *(?:\w+=\S+ )*ssl-run (.*)", header, flags=re.M):
            command = call.replace("${loss%% *}", "x")
            values = losses[0].split('" "') if "$loss" in command else [""]
            found += [command.replace("$loss", value).partition("  #")[0] for value in values]
    return found


@pytest.mark.slow  # composes all 250 jobs
@pytest.mark.parametrize("command", header_commands())
def test_header_commands_of_experiments_are_accepted(ssl_run, command: str) -> None:
    code, out, err = ssl_run(f"{command} --cfg job")
    assert (code, err) == (0, "")
    assert out


def test_grid_of_experiment_runs_all_jobs_without_m(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "grid.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1', gamma: '1,5'}}}\n"
    )
    code, out, _ = ssl_run(f"--config-dir mine experiment=grid gamma=7 hydra.sweep.dir=all {TINY}")
    assert code == 0
    assert out.startswith("the experiment sweeps: 2 jobs\n")
    configs = [OmegaConf.load(tmp_path / "all" / str(job) / ".hydra" / "config.yaml") for job in (0, 1)]
    assert [(config["seed"], config["gamma"]) for config in configs] == [(0, 7), (1, 7)]
