"""What the README shows must be what the program takes."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every line of a page that calls ssl-run or ./scripts/run, without its comment."""
    lines = [line.strip() for page in PAGES for line in page.read_text().splitlines()]
    calls = [
        re.sub(r"^(\./scripts/run|ssl-run)\b", "", line)
        for line in lines
        if re.match(r"(\./scripts/run|ssl-run)( |$)", line)
    ]
    return sorted({call.partition(" #")[0].strip() for call in calls})


@pytest.mark.parametrize(
    "command", [c for c in commands() if not re.search(r"resume=|--config-dir|FOLDER", c)]
)
def test_every_command_shown_is_accepted(ssl_run, command: str) -> None:
    """Composed and checked as a run would be; `--cfg job` in place of the run itself."""
    shown = [word for word in shlex.split(command) if word not in ("-m", "--multirun")]
    if shown != shlex.split(command):  # a sweep: its first job
        shown = [word for word in shown if "(" not in word]  # what a search varies
        shown = [word.partition(",")[0] if "=" in word and "[" not in word else word for word in shown]
    if not {"--help", "--cfg"} & set(shown):
        shown += ["--cfg", "job"]
    code, out, err = ssl_run(shlex.join(shown))
    assert (code, err) == (0, "")
    assert out


def test_no_placeholder_is_left() -> None:
    for page in [*PAGES, *(ROOT / "conf").rglob("*.yaml")]:
        assert "@@" not in page.read_text()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
