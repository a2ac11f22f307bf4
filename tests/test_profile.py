"""`profile=true` records a bounded number of steps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_runner import profile
from ssl_runner.evaluator import Columns
from tests.helpers import CPU, noise_loader


def test_profile_holds_the_first_steps_and_is_written_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "STEPS", 2)
    loader = noise_loader()
    written = []

    def epochs() -> Iterator[Columns]:
        for number in range(2):  # 3 steps each
            for _ in loader.batches(number):
                written.append((tmp_path / "trace.json").exists())
            yield {"epoch": number + 1}

    rows = list(profile.profiled(epochs(), loader, tmp_path, CPU))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert written == [False, False, True, True, True, True]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#0", "ProfilerStep#1"}
    assert "aten::" in (tmp_path / "profile.txt").read_text()
