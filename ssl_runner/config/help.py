"""The text of `ssl-run --help`: groups with their choices, and options with defaults and descriptions.

Descriptions are the comments in the yaml files, so that each has one source: the first sentence at the top of
a file describes a choice, and the comment behind a key describes an option.
"""

import argparse
import difflib
import re
import string
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import compose, hydra_internals, renamed
from ssl_runner.config.check import OPEN_MAPS, check_groups, key_of
from ssl_runner.config.compose import CHANGING
from ssl_runner.config.rules import LOSS_RULES, RULES, format_value
from ssl_runner.errors import UsageError, listed
from ssl_runner.rule import Rule

HYDRA = "https://hydra.cc/docs/configure_hydra/intro"
WIDTH, COLUMN = 110, 34  # characters per line, and before a description
# the part of a line before its comment: a # within quotes, or right behind a character, begins no comment
CODE = re.compile(r"""(?:'[^']*'|"[^"]*"|(?<=\S)\#|[^\#'"])*""")
KEY = re.compile(r"( *)(\w+):(?: |$)")
END_OF_SENTENCE = re.compile(r"(?<=\.)(?<!al\.)\s+(?=[A-Z0-9])")  # not in "et al. 2022"


class Option(NamedTuple):
    """An option: its dotted name, its value as on the command line, the accepted values, and its meaning."""

    name: str
    value: str
    accepted: str
    meaning: str

    def __str__(self) -> str:
        """Return the lines of --help, with the accepted values in brackets."""
        values = f"[{self.accepted}]" if self.accepted else ""
        return aligned(f"{self.name}={self.value}", f"{self.meaning} {values}".strip())


def help_text(args: argparse.Namespace) -> str:
    """Return the help for a command line: all groups and options, or those that it names.

    `loss=simclr` names a choice, `views` a group, and `gamma` or `optimizer.lr` an option. Raises UsageError
    if one of them does not exist.
    """
    overrides = compose.parse(word for word in args.overrides if "=" in word)
    names = [*map(key_of, overrides), *(word for word in args.overrides if "=" not in word)]
    with compose.composer(args) as composer:
        given = [
            override for override in overrides if composer.repository.group_exists(override.key_or_group)
        ]
        check_groups(composer, given)
        config, hydra = composer.compose(str(override.input_line) for override in given)
        files = Files(hydra_internals.config_folders(composer.repository))
        chosen = {str(group): choice for group, choice in hydra.runtime.choices.items() if files.has(group)}
        # in the order of the defaults list of config.yaml, then the nested groups, then those of Hydra
        order = list(chosen)[::-1]
        order.sort(key=lambda group: (group.startswith("hydra/"), "@" in group))
        chosen = {group: chosen[group] for group in order}
        if names:
            return "\n\n".join(
                section(name, composer.config_name, chosen, files, hydra) for name in dict.fromkeys(names)
            )
        comments = files.comments(composer.config_name, chosen)
        ours = config.loss.get("_target_", "").startswith("ssl_runner.")
        every = (
            Option(key, format_value(value), accepted(key, value, ours), comments.get(key, ""))
            for key, value in options(config)
        )
        return string.Template(hydra.help.template).safe_substitute(
            APP_CONFIG_GROUPS="\n".join(group_help(group, chosen[group], files) for group in chosen),
            CONFIG="\n".join(map(str, every)),
        )


def section(
    name: str, config_name: str, chosen: dict[str, str | None], files: "Files", hydra: DictConfig
) -> str:
    """Return the help for one group, with the options of its choice in `chosen`, or for one option.

    An option of several choices is shown for each. Of a config that changes other options, the whole file is
    shown. Raises UsageError if there is neither a group nor an option of this name.
    """
    tables = {"": files.options("", config_name)}
    if name in chosen:
        parts = [group for group in chosen if group == name or group.startswith(f"{name}@{name}.")]
        blocks = ["\n".join(group_help(part, chosen[part], files) for part in parts)]
        if name in CHANGING:
            blocks += [files.text(name, str(chosen[name])).strip()]
        else:
            shared = [option for option in tables[""] if option.name.startswith(f"{name}.")]
            own = [option for part in parts for option in files.options(part, chosen[part])]
            blocks += ["\n".join(map(str, shared + own))]
        return "\n\n".join(filter(None, blocks))
    groups = [group for group in chosen if "@" not in group and group not in CHANGING]
    if nested := re.match(r"relation(\.base)+(?=\.|$)", name):
        groups.append(f"relation@{nested[0]}")
    tables |= {f"{group}={it}": files.options(group, it) for group in groups for it in files.choices(group)}
    lines = []
    for title, table in tables.items():
        found = [option for option in table if concerns(option.name, name)]
        lines += [title, *map(str, found)] if found else []
    if not lines and (values := [line for line in of_hydra(hydra) if concerns(line.partition("=")[0], name)]):
        return "\n".join([f"of Hydra: {HYDRA}", *values])
    if not lines:
        raise UsageError(
            unknown(name, [*chosen, *(option.name for table in tables.values() for option in table)])
        )
    return "\n".join(filter(None, lines))


def concerns(option: str, name: str) -> bool:
    """Return whether an option is the named one, below it, or the map that holds the named entry."""
    return f"{option}.".startswith(f"{name}.") or (option in OPEN_MAPS and name.startswith(f"{option}."))


def of_hydra(hydra: DictConfig) -> Iterator[str]:
    """Yield a line for each of Hydra's own options, without what it fills in itself, and texts of help."""
    for key, value in options(hydra):
        if not re.match("runtime|overrides|help|hydra_help|job.(id|num|config_name)$", key):
            yield f"hydra.{key}={format_value(value)}"


def unknown(name: str, known: Iterable[str]) -> str:
    """Return the error message for a name that is not among the known groups and options."""
    if message := renamed.message(name):
        return message
    given = renamed.SYNONYMS.get(name, name).rpartition(".")[2]
    tails = {option: option.rpartition(".")[2] for option in known}  # optimizer.lr is known as lr
    close = [given] if given in tails.values() else difflib.get_close_matches(given, tails.values(), 3, 0.7)
    near = [option for last in dict.fromkeys(close) for option, tail in tails.items() if tail == last]
    hint = f" Did you mean {listed(near[:3], 'or')}?" if near else ""
    return f"--help {name}: expected a group or an option.{hint} List all: ssl-run --help"


def accepted(name: str, value: Any, of_loss: bool = True) -> str:
    """Return the values that an option accepts, or "" if the part of the run that reads it checks them.

    Without a rule, a value has the type of the default `value`, except in Hydra's own options. of_loss: an
    option at the top level may be one of a loss of this package.
    """
    name = re.sub(r"^relation\.(base\.)+", "relation.", name)
    if rule := RULES.get(name) or (LOSS_RULES.get(name) if of_loss else None):
        return str(rule)
    if name.startswith("hydra."):
        return ""
    if isinstance(value, list):
        return "a list"
    return str(Rule(type(value))) if type(value) in (int, float, bool) else ""


def group_help(group: str, chosen: str | None, files: "Files") -> str:
    """Return one line for a group, and one for each of its choices with a description.

    A group at a package of its own, such as relation@relation.base, has the choices of the group before @.
    """
    if "@" in group:
        return "\n".join(
            [f"{group}=", aligned(f"  * {chosen}", f"or another choice of {group.partition('@')[0]}")]
        )
    lines = [
        aligned(f"  {'*' if choice == chosen else ' '} {choice}", files.description(group, choice))
        for choice in files.choices(group)
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
        return any((folder / group.partition("@")[0]).is_dir() for folder in self.folders)

    def choices(self, group: str) -> list[str]:
        """Return the names of the files of a group."""
        return sorted(
            {
                path.stem
                for folder in self.folders
                for path in (folder / group.partition("@")[0]).glob("*.yaml")
            }
        )

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

    def options(self, group: str, choice: str | None) -> list[Option]:
        """Return the options in a file, as "relation@relation.base" has those of a nested config.

        The main config, in group "", has the options of all runs.
        """
        folder, _, package = group.partition("@")
        text = self.text(folder, str(choice))
        config, comments = OmegaConf.create(text), read_comments(text)
        assert isinstance(config, DictConfig)
        prefix = package_prefix(text, package or folder)
        of_loss = folder == "loss" and str(OmegaConf.select(config, "loss._target_")).startswith(
            "ssl_runner."
        )
        relative = [(key.removeprefix(prefix), key, value) for key, value in options(config, prefix)]
        return [
            Option(key, format_value(value), accepted(key, value, of_loss), comments.get(name, ""))
            for name, key, value in relative
            if name.partition(".")[0] not in ("defaults", "hydra")
        ]

    def comments(self, config_name: str, choices: dict[str, str | None]) -> dict[str, str]:
        """Return the comments behind the keys of the main config and of the chosen configs, by dotted key.

        If several files describe one key, the main config precedes.
        """
        found = read_comments(self.text("", config_name))
        for group, choice in choices.items():
            group, _, package = group.partition("@")
            text = self.text(group, str(choice))
            prefix = package_prefix(text, package or group)
            for key, comment in read_comments(text).items():
                found.setdefault(prefix + key, comment)
        return found


def package_prefix(text: str, package: str) -> str:
    """Return what precedes the keys of a file in the configuration: "" or the package and a dot."""
    return "" if not package or "@package _global_" in text else f"{package.replace('/', '.')}."


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
