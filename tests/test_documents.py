"""The pages agree with the program: their commands are accepted, and their links exist."""

import re
import shlex
from pathlib import Path

import pytest

from scripts import options_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The commands of all pages that call ssl-run or ./scripts/run, without comments."""
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
def test_commands_of_pages_are_accepted(ssl_run, command: str) -> None:
    """The command is composed and checked as for a run, but `--cfg job` replaces the run."""
    shown = [word for word in shlex.split(command) if word not in ("-m", "--multirun")]
    if shown != shlex.split(command):  # a sweep: check its first job
        shown = [word for word in shown if "(" not in word]  # ranges of a search
        shown = [word.partition(",")[0] if "=" in word and "[" not in word else word for word in shown]
    if not {"--help", "--cfg"} & set(shown):
        shown += ["--cfg", "job"]
    code, out, err = ssl_run(shlex.join(shown))
    assert (code, err) == (0, "")
    assert out


def test_page_of_options_is_up_to_date() -> None:
    assert options_page.PAGE.read_text("utf-8") == options_page.page(), "run python scripts/options_page.py"


def test_pages_have_no_placeholders() -> None:
    for page in [*PAGES, *(ROOT / "conf").rglob("*.yaml")]:
        assert "@@" not in page.read_text()


def test_lines_of_pages_are_short() -> None:
    """At most 120 columns, apart from tables, code and the targets of links."""
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(
            r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), page.read_text(), flags=re.M | re.S
        )
        for number, line in enumerate(text.splitlines(), 1):
            shown = re.sub(r"\]\([^)]*\)", "]()", line)
            assert len(shown) <= 120 or line.startswith(("|", "    ")), f"{page.name}:{number}"


def test_links_of_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
