"""Write docs/options.md: python scripts/options_page.py

The page has all options with default, accepted values and meaning. They come from the files
in conf/, as in `ssl-run --help`, and from the rules that check the values.
"""

import textwrap
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssl_runner.config.compose import CONF
from ssl_runner.config.help import Files, options, read_comments
from ssl_runner.config.rules import LOSS_RULES, RULES, format_value

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
TOP = """# Options

Every option of `ssl-run`. `python scripts/options_page.py` writes this page from the files in `conf/`.
`ssl-run --help loss=simclr` shows the options of a choice, and their values in a run.

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
    parts = [TOP, "## All runs\n", table("", files.text("", "config"))]
    groups = {str(file.parent.relative_to(CONF)) for file in CONF.rglob("*/*.yaml")}
    for group in sorted(groups - {"experiment", "experiment/shared"}, key=lambda name: ("/" in name, name)):
        parts.append(f"## {group}\n")
        for file in sorted((CONF / group).glob("*.yaml")):
            text, name = file.read_text("utf-8"), f"`{group}={file.stem}`"
            name = f"**{name}**" if str((group, file.stem)) in chosen else name
            prefix = "" if "@package _global_" in text else f"{group.replace('/', '.')}."
            parts += [wrapped(f"{name}: {files.description(group, file.stem)}"), table(prefix, text)]
    return "\n".join(filter(None, parts))


def wrapped(text: str) -> str:
    """A paragraph in lines of 110 columns, followed by an empty line."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False) + "\n"


def table(prefix: str, text: str) -> str:
    """The options of a file as a table, or "" if it has none."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    comments, rows = read_comments(text), []
    for key, value in options(config):
        if key.partition(".")[0] in ("defaults", "hydra"):
            continue
        name = prefix + key
        rule = RULES.get(name) or ("" if prefix else LOSS_RULES.get(name, ""))
        cells = [f"`{name}`", f"`{format_value(value)}`", str(rule), comments.get(key, "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = ["| option | default | accepted | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


if __name__ == "__main__":
    main()
