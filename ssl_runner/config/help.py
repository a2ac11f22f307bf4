"""The text of `ssl-run --help`: groups with their choices, and options with defaults and descriptions.

Descriptions are the comments in the yaml files, so that each has one source: the first sentence at the top of
a file describes a choice, and the comment behind a key describes an option.
"""

import argparse
import re
import string
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import compose, hydra_internals
from ssl_runner.config.check import OPEN_MAPS
from ssl_runner.config.rules import format_value

WIDTH, COLUMN = 110, 34  # characters per line, and before a description
# the part of a line before its comment: a # within quotes, or right behind a character, begins no comment
CODE = re.compile(r"""(?:'[^']*'|"[^"]*"|(?<=\S)\#|[^\#'"])*""")
KEY = re.compile(r"( *)(\w+):(?: |$)")
END_OF_SENTENCE = re.compile(r"(?<=\.)(?<!al\.)\s+(?=[A-Z0-9])")  # not in "et al. 2022"


def help_text(args: argparse.Namespace) -> str:
    """Return the help for a command line: with loss=simclr, the options of this loss.

    Raises UsageError if the command line has an unknown choice.
    """
    with compose.composer(args) as composer:
        config, hydra = composer.compose(
            str(override.input_line)
            for override in compose.parse(args.overrides)
            if not override.is_sweep_override()
        )
        chosen = {str(group): choice for group, choice in hydra.runtime.choices.items()}
        # in the order of the defaults list of config.yaml, then the nested groups, then those of Hydra
        order = list(chosen)[::-1]
        order.sort(key=lambda group: (group.startswith("hydra/"), "@" in group))
        choices = {group: chosen[group] for group in order}
        files = Files(hydra_internals.config_folders(composer.repository))
        groups = "\n".join(
            group_help(group, choice, composer.repository.get_group_options(group), files)
            for group, choice in choices.items()
            if files.has(group.partition("@")[0])
        )
        comments = files.comments(composer.config_name, choices)
        settings = "\n".join(
            aligned(f"{key}={format_value(value)}", comments.get(key, "")) for key, value in options(config)
        )
        return string.Template(hydra.help.template).safe_substitute(APP_CONFIG_GROUPS=groups, CONFIG=settings)


def group_help(group: str, chosen: str | None, choices: list[str], files: "Files") -> str:
    """Return one line for a group, and one for each of its choices with a description.

    A group at a package of its own, such as relation@relation.base, has the choices of the group before @.
    """
    if "@" in group:
        return "\n".join(
            [f"{group}=", aligned(f"  * {chosen}", f"or another choice of {group.partition('@')[0]}")]
        )
    lines = [
        aligned(f"  {'*' if choice == chosen else ' '} {choice}", files.description(group, choice))
        for choice in choices
        if files.text(group, choice)
    ]
    return "\n".join([f"{group}=", *lines])


def aligned(name: str, description: str) -> str:
    """Return a name and its description, which is wrapped in a column of its own."""
    first = f"{name:<{COLUMN - 2}}  "
    if len(first) > COLUMN and description:
        return f"{name}\n{aligned('', description)}"
    lines = textwrap.wrap(description, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    return "\n".join([first + lines[0], *(" " * COLUMN + line for line in lines[1:])]).rstrip()


def options(config: DictConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values, those at the top level first. Interpolations stay as written.

    Omitted are `_target_`, and the arguments of the loss that stand at the top level as well.
    """
    content: Any = OmegaConf.to_container(config, resolve=False)
    nodes = {name: value for name, value in content.items() if isinstance(value, dict) and value}
    for name, value in content.items():
        mirrored = path == "loss." and value == f"${{{name}}}"
        if name not in nodes and name != "_target_" and not mirrored:
            yield f"{path}{name}", value
    for name, value in nodes.items():
        key = f"{path}{name}"
        if key in OPEN_MAPS:
            yield key, f"{{{','.join(value)}}}"
        yield from options(OmegaConf.create(value), f"{key}.")


class Files:
    """The yaml files of a search path, whose folders are searched in order."""

    def __init__(self, folders: list[Path]):
        self.folders = folders

    def has(self, group: str) -> bool:
        """Return whether the group has a folder of this package, unlike Hydra's own groups."""
        return any((folder / group).is_dir() for folder in self.folders)

    def text(self, group: str, choice: str) -> str:
        """Return the content of a yaml file, or "" if no folder has it."""
        paths = (folder / group / f"{choice}.yaml" for folder in self.folders)
        return next((path.read_text("utf-8") for path in paths if path.is_file()), "")

    def description(self, group: str, choice: str) -> str:
        """Return the first sentence of the comment at the top of a file."""
        lines = []
        for line in self.text(group, choice).splitlines():
            comment = line.removeprefix("#").strip()
            if line.startswith("#") and comment and not comment.startswith(("@package", "ssl-run")):
                lines.append(comment)
            elif lines or not line.startswith("#"):
                break
        return END_OF_SENTENCE.split(" ".join(lines))[0]

    def comments(self, config_name: str, choices: dict[str, str | None]) -> dict[str, str]:
        """Return the comments behind the keys of the main config and of the chosen configs, by dotted key.

        If several files describe one key, the main config precedes.
        """
        found = read_comments(self.text("", config_name))
        for group, choice in choices.items():
            group, _, package = group.partition("@")
            text = self.text(group, str(choice))
            prefix = "" if "@package _global_" in text else f"{package or group.replace('/', '.')}."
            for key, comment in read_comments(text).items():
                found.setdefault(prefix + key, comment)
        return found


def read_comments(text: str) -> dict[str, str]:
    """Return the comments of a yaml file of block mappings, by the dotted key in whose line they stand.

    A line that has only a comment continues the one above if both comments begin in the same column.
    """
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # indentation and name of the keys around the line
    key, column = "", -1
    for line in text.splitlines():
        code = CODE.match(line)[0]  # type: ignore[index]  # matches the empty string as well
        comment = line[len(code) :].removeprefix("#").strip()
        if match := KEY.match(code):
            indentation = len(match[1])
            parents = [*(parent for parent in parents if parent[0] < indentation), (indentation, match[2])]
            key, column = ".".join(name for _, name in parents), len(code)
            if comment:
                found[key] = comment
        elif comment and not code.strip() and len(code) == column and key in found:
            found[key] += f" {comment}"
    return found
