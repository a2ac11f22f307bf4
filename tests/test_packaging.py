"""A wheel and an editable install find conf/, in fresh environments that share only the dependencies."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_finds_conf(kind: str, fresh: Path, tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    if kind == "wheel":
        call(fresh / "python", "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
        [wheel] = tmp_path.glob("ssl_runner-*.whl")
        call(fresh / "python", "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    else:
        call(fresh / "python", "-m", "pip", "install", *options, "--editable", ROOT, cwd=tmp_path)
    where = Path(
        call(
            fresh / "python", "-c", "from ssl_runner import config; print(config.CONF)", cwd=tmp_path
        ).strip()
    )
    assert where.is_relative_to(ROOT if kind == "editable" else tmp_path)
    for command in ([fresh / "ssl-run"], [fresh / "python", "-m", "ssl_runner"]):
        assert "gamma: 7" in call(
            *command, "loss=vicreg", "gamma=7", "--cfg", "job", "--resolve", cwd=tmp_path
        )
    packaged = {path.relative_to(where) for path in where.rglob("*.yaml")}
    assert packaged == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
