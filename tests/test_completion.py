"""Shell completion: groups, choices and options continue a line, and nothing disturbs the prompt."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LINES = [
    ("loss=si", {"loss=sigreg", "loss=simclr"}),
    ("loss=simclr ta", {"tags=", "tau="}),  # an option of the chosen loss
    ("optimizer.warm", {"optimizer.warmup_epochs="}),
    ("-m hydra/launcher=j", {"hydra/launcher=joblib"}),
    ("--config-dir mine experiment=m", {"experiment=my_own"}),
    ("--config-dir=mine experiment=m", {"experiment=my_own"}),
    ("--config-dir nowhere loss=si", set()),
    ("gamma=(1 los", set()),  # cannot be read yet
    ("'a b", set()),
    ("--bogus los", set()),
    ("loss=none gam", set()),
    ("--config-dir mine experiment=broken gam", set()),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_line_is_continued(line: str, words: set[str], ssl_run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "my_own.yaml").write_text("# @package _global_\nepochs: 1\n")
    (tmp_path / "mine" / "experiment" / "broken.yaml").write_text("epochs:\t1\n")
    monkeypatch.setenv("COMP_LINE", f"ssl-run {line}")
    code, out, err = ssl_run("-sc query=bash")
    assert (code, err) == (0, "")
    prefix = line.split()[-1]
    assert {word for word in out.split() if word.startswith(prefix)} == words


@pytest.mark.parametrize("given", ["", "install", "install=tcsh", "install=bash loss=vicreg"])
def test_other_arguments_are_refused(given: str, ssl_run) -> None:
    code, out, err = ssl_run(f"-sc {given}")
    assert (code, out) == (1, "")
    assert err.startswith(f"--shell-completion {given}: expected install=<shell>")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_after_install(tmp_path: Path) -> None:
    command = tmp_path / "ssl-run"
    start = "import sys; sys.argv[0] = 'ssl-run'; from ssl_runner.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    command.chmod(0o755)
    script = f"""
        PATH={tmp_path}:$PATH
        eval "$(ssl-run -sc install=bash)"
        COMP_LINE="ssl-run loss=simclr tau" COMP_CWORD=2 COMP_POINT=22
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
        complete -p ssl-run
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    words, rule = done.stdout.splitlines()
    assert words == "tau="
    assert rule.endswith("-F hydra_bash_completion ssl-run")
