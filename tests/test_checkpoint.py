"""Checkpoints survive crashes and damage, and load without executing code."""

from pathlib import Path

import pytest
import torch

from ssl_runner.errors import UsageError
from ssl_runner.runs import checkpoint


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
def test_find_skips_damaged_checkpoint(
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
    with pytest.raises(UsageError, match="it contains a pickled getattr"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
