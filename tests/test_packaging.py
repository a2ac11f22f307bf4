"""Wheel and editable install contain conf/ and the digits. Fresh environments share only the dependencies."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PRINT_CONF = "from ssl_runner.config.compose import CONF; print(CONF)"
PRINT_DIGITS = "from ssl_runner.data import readers; print(readers.__file__, *readers.mnist5k().images.shape)"


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Create a virtual environment and return its bin folder.

    A .pth file adds the site-packages of the current environment but not its own .pth files, so an editable
    install of ssl_runner is not importable in the new environment.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    (Path(paths["purelib"]) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bin_folder = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    import_attempt = subprocess.run(
        [bin_folder / "python", "-c", "import ssl_runner.cli"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "ModuleNotFoundError" in import_attempt.stderr
    return bin_folder


def test_environment_has_the_required_versions_of_hydra_plugins() -> None:
    """The preset of optuna sets `max_failure_rate`, which hydra-optuna-sweeper 1.2.0 does not accept."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = {one.name: one.specifier for one in map(Requirement, [*extras["slurm"], *extras["sweep"]])}
    assert not required["hydra-optuna-sweeper"].contains("1.2.0")
    assert [name for name, accepted in required.items() if not accepted.contains(version(name))] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_has_conf_and_digits(kind: str, fresh: Path, tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    if kind == "wheel":
        call(fresh / "python", "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
        [wheel] = tmp_path.glob("ssl_runner-*.whl")
        call(fresh / "python", "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    else:
        call(fresh / "python", "-m", "pip", "install", *options, "--editable", ROOT, cwd=tmp_path)
    conf = Path(call(fresh / "python", "-c", PRINT_CONF, cwd=tmp_path).strip())
    assert conf.is_relative_to(ROOT if kind == "editable" else tmp_path)
    for command in ([fresh / "ssl-run"], [fresh / "python", "-m", "ssl_runner"]):
        assert "gamma: 7" in call(
            *command, "loss=vicreg", "gamma=7", "--cfg", "job", "--resolve", cwd=tmp_path
        )
    assert "relation.csv" in call(fresh / "ssl-relation", "--help", cwd=tmp_path)
    packaged = {path.relative_to(conf) for path in conf.rglob("*.yaml")}
    assert packaged == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    file, *shape = call(fresh / "python", "-c", PRINT_DIGITS, cwd=tmp_path).split()
    assert shape == ["5000", "1", "28", "28"]
    assert Path(file).with_name("mnist5k.md").is_file()  # source and licence
