"""CSV tables, JSON and checkpoints survive crashes."""

from pathlib import Path

import pytest
import torch

from ssl_runner.errors import UsageError
from ssl_runner.runs import checkpoint
from ssl_runner.runs.files import CsvLog, read_json, write_json


def test_table_appends_rows_under_one_header(tmp_path: Path) -> None:
    for row in ({"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": None}):
        CsvLog(tmp_path / "t.csv").append(row)
    assert (tmp_path / "t.csv").read_text() == "epoch,loss\n1,0.30000000000000004\n2,\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epoch,loss\n1,0.5\n2,0.4\n3,0.3\n", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,loss\n1,0.5\n2,0.4\n3,0.", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,loss\n1,0.5\n2,0.4\n", "epoch,loss\n1,0.5\n2,0.4\n"),
        ("epoch,lo", ""),
        ("", ""),
    ],
)
def test_table_keep_drops_later_rows_and_incomplete_lines(
    content: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    CsvLog(path).truncate_after(2)
    assert path.read_text() == expected
    CsvLog(path).append({"epoch": 3, "loss": 0.3})
    assert path.read_text() == (expected or "epoch,loss\n") + "3,0.3\n"


def test_crash_during_save_keeps_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.find(tmp_path) is None
    checkpoint.save({"epoch": 1, "weights": torch.ones(3)}, tmp_path)

    def crash(state: object, file) -> None:
        file.write(b"half a check")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"epoch": 2}, tmp_path)
    assert checkpoint.load(checkpoint.find(tmp_path))["epoch"] == 1


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "empty", "checksum missing"])
def test_newest_skips_damaged_checkpoint(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2, 3):
        checkpoint.save({"epoch": epoch, "weights": torch.ones(300)}, tmp_path)
    path = tmp_path / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["epoch"] == 3  # torch.load ignores the checksum
    assert checkpoint.find(tmp_path) == path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {
        "truncated": content[:-200],
        "bit flipped": content,
        "empty": b"",
        "checksum missing": content[:-72],
    }
    path.write_bytes(damaged[damage])
    before = checkpoint.find(tmp_path)
    assert checkpoint.load(before)["epoch"] == 2
    assert f"{path} is damaged" in capsys.readouterr().err

    before.write_bytes(b"PK")
    with pytest.raises(UsageError, match="no intact checkpoint to resume from: remove checkpoint-before"):
        checkpoint.find(tmp_path)


def test_crash_between_renames_keeps_previous_checkpoint(tmp_path: Path) -> None:
    checkpoint.save({"epoch": 1}, tmp_path)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint-before.pt")
    assert checkpoint.load(checkpoint.find(tmp_path))["epoch"] == 1


def test_load_does_not_execute_pickled_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"epoch": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_json_round_trip_leaves_no_partial_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
