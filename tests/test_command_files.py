"""Config files and folders that a command line names: refused in one line, or used as they are."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from ssl_runner.config.hydra_internals import FileConfigSource
from ssl_runner.errors import UsageError
from ssl_runner.runs.resume import check_creatable
from tests.helpers import TINY

HEADER = b"# @package _global_\n"


def source(folder: Path, content: bytes) -> FileConfigSource:
    (folder / "own.yaml").write_bytes(content)
    return FileConfigSource("command-line", f"file://{folder}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + b"gamma: 5\n\tepochs: 1\n", ", line 3: found a tab; use spaces"),
        (HEADER + b"optimizer:\n\tlr: 1\n", ", line 3: found a tab; use spaces"),
        (HEADER + b"gamma:\t5\n", ", line 2: found a tab; use spaces"),
        (
            HEADER + b"gamma: 5\nepochs: 1\ngamma: 6\n",
            ", line 4: found duplicate key gamma; keep one of them",
        ),
        (
            HEADER + b"optimizer:\n  lr: 1\n  lr: 2\n",
            ", line 4: found duplicate key lr; keep one of them",
        ),
        (HEADER + b"gamma: [5\nepochs: 1\n", ", line 3: expected ',' or ']', but got ':'; correct the YAML"),
        (HEADER + b"gamma: 'five\n", ", line 3: found unexpected end of stream; correct the YAML"),
        (HEADER + b"a: *x\n", ", line 2: found undefined alias 'x'; correct the YAML"),
        (HEADER + b"a: 1\n b: 2\n", ", line 3: mapping values are not allowed here; correct the YAML"),
        (HEADER + b"a: !!python/object:os.system 3\n", ", line 2: could not determine a constructor"),
        (HEADER + b"a: 1\n---\nb: 1\n", ", line 3: but found another document; correct the YAML"),
        (HEADER + b"a: b\x01\n", ", line 2: special characters are not allowed; correct the YAML"),
        (HEADER + b"# caf\xe9\n", ", line 2: expected UTF-8; save the file in this encoding"),
        (HEADER.decode().encode("utf-16"), ", line 1: expected UTF-8; save the file in this encoding"),
        (HEADER + b"gamma:5\n", ": expected options; write one '<key>: <value>' per line"),
        (HEADER + b"- gamma\n- 5\n", ": expected options; write one '<key>: <value>' per line"),
        (b"", ": expected options, found an empty file; write them, or remove the file"),
        (b" \n\n", ": expected options, found an empty file; write them, or remove the file"),
        (b"\xef\xbb\xbf", ": expected options, found an empty file; write them, or remove the file"),
    ],
)
def test_file_that_is_no_yaml_of_options_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UsageError) as error:
        source(tmp_path, content).load_config("own")
    assert str(error.value).startswith(f"{tmp_path}/own.yaml{message}")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "content",
    [
        HEADER + b"gamma: 5\n",
        (HEADER + b"gamma: 5\n").replace(b"\n", b"\r\n"),
        HEADER + b"gamma: 5\nname: \xe6\x97\xa5\xe6\x9c\xac\n",
        HEADER,
    ],
)
def test_file_of_options_is_read_with_and_without_byte_order_mark(
    tmp_path: Path, content: bytes, mark: bytes
) -> None:
    result = source(tmp_path, mark + content).load_config("own")
    assert result.config == (yaml.safe_load(content) or {})
    assert result.header == {"package": "_global_"}


@pytest.mark.parametrize(
    ("name", "content", "code", "found"),
    [
        ("experiment", b"\xef\xbb\xbf# @package _global_\ngamma: 5\n", 0, "gamma: 5"),
        (
            "experiment",
            b"# @package _global_\ngamma: 5\n\tepochs: 1\n",
            1,
            "experiment/own.yaml, line 3: found a tab",
        ),
        ("loss", b"", 1, "loss/own.yaml: expected options, found an empty file"),
        (
            "experiment",
            b"# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      gamma: 1,-10\n",
            1,
            "gamma=-10: expected a number >= 0",
        ),
    ],
)
def test_command_line_reads_files_of_the_config_folder(
    ssl_run, tmp_path: Path, name: str, content: bytes, code: int, found: str
) -> None:
    folder = tmp_path / "mine" / name
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_bytes(content)
    result, out, err = ssl_run(f"--config-dir mine {name}=own --cfg job")
    assert result == code
    assert found in (err if code else out)
    assert err.count("\n") == code
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_relative_paths_start_at_the_folder_of_the_command_with_chdir(ssl_run, tmp_path: Path) -> None:
    """The labels of the relation, and the folder of the run."""
    (tmp_path / "pairs.csv").write_text("i,j\n" + "".join(f"{i},{i + 1}\n" for i in range(4999)))
    code, _, err = ssl_run(
        f"{TINY} epochs=1 diagnostics.every=0 hydra.job.chdir=true hydra.run.dir=a/run relation=edges"
        " relation.path=pairs.csv"
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "a/run/run.json").read_text())["cwd"] == str(tmp_path)
    assert Path.cwd() == tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "pairs.csv", "data"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("link", "File exists"),
        ("/proc/ssl_runner/x", "No such file or directory"),
        ("a" * 300, "File name too long"),
        ("closed/x", "Permission denied"),
        ("closed", "Permission denied"),
    ],
)
def test_folder_that_cannot_be_created_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("closed").mkdir(0o500)
    if reason == "Permission denied" and os.access("closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UsageError, match=re.escape("=" + path)) as error:
        check_creatable("hydra.run.dir", Path(path))
    assert f"found '{reason}'; choose another one" in str(error.value)


@pytest.mark.parametrize("path", ["a/b/c", "a/../b", "kept", "kept/b", ".", "${oc.env:NONE}/x"])
def test_folder_that_can_be_created_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept").mkdir()
    check_creatable("hydra.run.dir", Path(path))
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


@pytest.mark.parametrize(
    "command", ["hydra.run.dir=taken", "hydra.run.dir=taken/run", "-m hydra.sweep.dir=taken seed=0,1"]
)
def test_command_with_a_closed_folder_writes_nothing(ssl_run, tmp_path: Path, command: str) -> None:
    (tmp_path / "taken").touch()
    code, out, err = ssl_run(command)
    assert (code, out) == (1, "")
    assert "expected a folder that can be created and written to, found 'Not a directory'" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
