"""CSV and JSON files survive crashes."""

from pathlib import Path

import pytest

from ssl_runner.report.read import read_csv
from ssl_runner.runs.files import CsvLog, atomic_write, read_json, write_json


def test_csv_log_appends_rows_under_one_header(tmp_path: Path) -> None:
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
def test_truncate_after_drops_later_rows_and_incomplete_lines(
    content: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    CsvLog(path).truncate_after(2)
    assert path.read_text() == expected
    CsvLog(path).append({"epoch": 3, "loss": 0.3})
    assert path.read_text() == (expected or "epoch,loss\n") + "3,0.3\n"


def test_json_round_trip_leaves_no_partial_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("concurrent", [False, True])
def test_atomic_write_that_fails_keeps_previous_file(concurrent: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path, concurrent) as file:
        file.write(b"old")
        assert not path.exists()

    def fail() -> None:
        with atomic_write(path, concurrent) as file:
            file.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a": b"old"}


def test_csv_log_keeps_characters_that_splitlines_splits_at(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "t.csv")
    name = "a\x0b\x0c\x1c\x85\u2028\u2029b"
    log.append({"epoch": 1, "dataset": name})
    log.append({"epoch": 2, "dataset": name, "draw": 0})
    log.truncate_after(1)
    assert read_csv(tmp_path / "t.csv", []) == (["epoch", "dataset", "draw"], [["1", name, ""]])
