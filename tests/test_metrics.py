"""What a crash may leave behind, and what a resumed run finds."""

from pathlib import Path

import pytest
import torch

from ssl_runner import checkpoint
from ssl_runner.errors import Refused
from ssl_runner.metrics import Table, read_json, write_json


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    for row in ({"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": None}):
        Table(tmp_path / "t.csv").append(row)
    assert (tmp_path / "t.csv").read_text() == "epoch,loss\n1,0.30000000000000004\n2,\n"


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ("epoch,loss\n1,0.5\n2,0.4\n3,0.3\n", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,loss\n1,0.5\n2,0.4\n3,0.", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,loss\n1,0.5\n2,0.4\n", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,lo", ""),
        ("", ""),
    ],
)
def test_rows_after_the_checkpoint_and_torn_lines_are_dropped(left: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(left)
    Table(path).keep(2)
    assert path.read_text() == kept
    Table(path).append({"epoch": 3, "loss": 0.3})
    assert path.read_text() == (kept or "epoch,loss\n") + "3,0.3\n"


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save({"epoch": 1, "weights": torch.ones(3)}, tmp_path)

    def crash(state: object, file) -> None:
        file.write(b"half a check")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"epoch": 2}, tmp_path)
    assert checkpoint.load(checkpoint.newest(tmp_path))["epoch"] == 1


@pytest.mark.parametrize("harm", ["cut", "one bit", "emptied", "sealed anew by nobody"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2, 3):
        checkpoint.save({"epoch": epoch, "weights": torch.ones(300)}, tmp_path)
    path = tmp_path / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["epoch"] == 3  # a plain archive to everybody else
    assert checkpoint.newest(tmp_path) == path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {
        "cut": content[:-200],
        "one bit": content,
        "emptied": b"",
        "sealed anew by nobody": content[:-72],
    }
    path.write_bytes(damaged[harm])
    before = checkpoint.newest(tmp_path)
    assert checkpoint.load(before)["epoch"] == 2
    assert f"{path} is damaged" in capsys.readouterr().err

    before.write_bytes(b"PK")
    with pytest.raises(Refused, match="no whole checkpoint to go on from: remove checkpoint-before"):
        checkpoint.newest(tmp_path)


def test_a_crash_between_two_renames_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.save({"epoch": 1}, tmp_path)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint-before.pt")
    assert checkpoint.load(checkpoint.newest(tmp_path))["epoch"] == 1


def test_a_checkpoint_that_carries_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"epoch": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
