"""Write docs/options.md: python scripts/options_page.py

The page has all options with default, accepted values and meaning. They come from the files
in conf/, as in `ssl-run --help`, and from the rules that check the values.
"""

import textwrap
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssl_runner.config.compose import CONF
from ssl_runner.config.help import Files, Option

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
TOP = """# Options

Every option of `ssl-run`. `python scripts/options_page.py` writes this page from the files in `conf/`.
`ssl-run --help loss=simclr` prints the part of one choice, `ssl-run --help views` that of a group, and
`ssl-run --help gamma optimizer.lr` that of single options.

- `key=value` sets an option; `group=choice` takes the options of a file of `conf/`. The default is bold.
- `+key=value` adds an argument that a class or function accepts and no file lists.
- Where no accepted values are given, the part of the run checks the value itself.
- The choices of `experiment` set other options: `ssl-run --help` lists them.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")
    print(PAGE)


def page() -> str:
    """The text of the page."""
    files = Files([CONF])
    config = OmegaConf.load(CONF / "config.yaml")
    assert isinstance(config, DictConfig)
    chosen = {
        str(item) for entry in config.defaults if isinstance(entry, DictConfig) for item in entry.items()
    }
    parts = [TOP, "## All runs\n", table(files.options("", "config"))]
    groups = {str(file.parent.relative_to(CONF)) for file in CONF.rglob("*/*.yaml")}
    for group in sorted(groups - {"experiment", "experiment/shared"}, key=lambda name: ("/" in name, name)):
        parts.append(f"## {group}\n")
        for file in sorted((CONF / group).glob("*.yaml")):
            name = f"`{group}={file.stem}`"
            name = f"**{name}**" if str((group, file.stem)) in chosen else name
            text = f"{name}: {files.description(group, file.stem)}"
            parts += [wrapped(text), table(files.options(group, file.stem))]
    return "\n".join(filter(None, parts))


def wrapped(text: str) -> str:
    """A paragraph in lines of 110 columns, followed by an empty line."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False) + "\n"


def table(options: list[Option]) -> str:
    """The options of a file as a table, or "" if it has none."""
    rows = []
    for option in options:
        cells = [f"`{option.name}`", f"`{option.value}`", option.accepted, option.meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = ["| option | default | accepted | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


if __name__ == "__main__":
    main()
