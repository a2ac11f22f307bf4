"""Paths in overrides: quotes for Hydra's grammar, and for a shell."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ssl_runner.errors import UsageError

OPTIONS = re.compile(  # whose values are paths
    r"dataset\.(root|files|cache|name)|init_weights|weights|resume|relation\.(base\.)*path"
    r"|backbone\.checkpoint_path|hydra\.(run|sweep)\.dir"
)
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")  # made by Hydra, which does not expand ~
SPECIAL = re.compile(r"[^\w\s/\\+.$%*@?|:-]|[^\x00-\x7f]")  # not allowed in values without quotes
LETTERS = re.compile(r"[^\W\x00-\x7f]|[\udc80-\udcff]|~")  # the second: bytes of names that are not UTF-8
INVALID = object()


def escape(node: Any) -> Any:
    r"""Return a text that OmegaConf resolves to `node`: \${ for ${, which would begin an interpolation.

    Also for all texts in nested lists and dicts. Other values stay as they are.
    """
    if isinstance(node, dict):
        return {key: escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [escape(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def quote(path: str | Path) -> str:
    """Return a path in quotes, as the value of an override. It is not interpolated."""
    return QuotedString(escape(str(path)), Quote.single).with_quotes()


def resolved(config: DictConfig | ListConfig) -> DictConfig:
    """Return a configuration without interpolations, in which a path may contain ${.

    After `OmegaConf.resolve`, the next access would resolve such a path.
    """
    result = OmegaConf.create(escape(OmegaConf.to_container(config, resolve=True)))
    OmegaConf.set_struct(result, True)
    return result


def unquoted(value: str) -> Path:
    r"""Return the path of the value of an override, with ${ for \${."""
    return Path(re.sub(r"(\\*)\1\\\$\{", r"\1${", value))


def override(key: str, path: str | Path) -> str:
    """Return an override that can be pasted into a shell, with quotes only where they are needed."""
    plain = f"{key}={path}"
    needs_none = _value(plain) == str(path) and "${" not in str(path)
    return in_shell(plain if needs_none else f"{key}={quote(path)}")


def in_shell(word: str) -> str:
    """Return a word in quotes for a shell, if it needs them."""
    if shlex.quote(word) == word or re.search(r"[$`!]", word):
        return shlex.quote(word)
    return '"{}"'.format(re.sub(r'([\\"])', r"\\\1", word))


def complete(lines: list[str], multirun: bool = False) -> list[str]:
    """Return overrides with quotes around paths that Hydra's grammar would not read as they were given.

    These are values of options for paths: those that exist, and others whose only special characters are ~
    and letters beyond ASCII. Lists are quoted by element. Raises UsageError for a value that exists, but is
    also a sweep in a sweep (`multirun`), and for a ~ without a known user.
    """
    return [_complete(line, multirun) for line in lines]


def _complete(line: str, multirun: bool) -> str:
    key, _, text = line.partition("=")
    if not OPTIONS.fullmatch(key.lstrip("+")):
        return line
    value = _value(line)
    if value is None or isinstance(value, bool):
        return line
    if _exists(text) and (value != text or "${" in text):
        if multirun and isinstance(value, Sweep):
            one, several = (in_shell(f"{key}={given}") for given in (quote(text), f"choice({text})"))
            raise UsageError(
                f"{line}: expected a sweep or a path, and {text} exists; write {one} for this path, or"
                f" {several} for a sweep"
            )
        return f"{key}={quote(_expanded(key, text))}"
    if _is_list(text) and (value != _elements(text) or "${" in text) and all(map(_exists, _elements(text))):
        return f"{key}={_quoted(text)}"
    clear = value is INVALID and not SPECIAL.search(LETTERS.sub("", text))
    home = isinstance(value, str) and value.startswith("~")
    return f"{key}={quote(_expanded(key, text if clear else value))}" if clear or home else line


def refuse(line: str, error: HydraException) -> UsageError:
    """Return the error for an override that Hydra cannot parse, with what to write."""
    key, equals, text = line.partition("=")
    special = SPECIAL.search(text)
    is_path = OPTIONS.fullmatch(key.lstrip("+"))
    syntax = re.match(r"[\[{'\"]|\w+\(", text)  # a list, a dict, quotes or a function with an error in it
    if not equals or not re.fullmatch(r"[\w.+~@/$:-]+", key):
        return UsageError(f"{line}: expected <group>=<name> or <key>=<value>, without spaces around =")
    _, of_function, problem = (
        " ".join(str(error).split()).split(" See https")[0].partition(" while evaluating ")
    )
    as_text = f"or write {in_shell(f'{key}={quote(text)}')} for a text"
    if of_function and not is_path:
        problem = re.sub(r"('\w+') Available: (.*)", r"\1, expected one of \2", problem.partition(": ")[2])
        return UsageError(f"{line}: {problem.replace(',', ', ')}; correct the call, {as_text}")
    if not special or (syntax and not is_path):
        return UsageError(f"{line}: expected complete brackets and quotes, and nothing after them; {as_text}")
    quoted = _quoted(text) if _is_list(text) else quote(text)
    return UsageError(
        f"{line}: expected quotes around a value that contains {special[0]!r}; write"
        f" {in_shell(f'{key}={quoted}')}"
    )


def sweep(line: str) -> UsageError:
    """Return the error for a sweep in a single run."""
    key, _, text = line.partition("=")
    path = f", or quote a path as {in_shell(f'{key}={quote(text)}')}" if OPTIONS.fullmatch(key) else ""
    return UsageError(
        f"{line} is a sweep: add -m for one run per value (in Python: a loop), or write a list as [a,b]{path}"
    )


def _value(line: str) -> Any:
    """The value of an override, INVALID if Hydra cannot parse it."""
    try:
        return OverridesParser.create().parse_override(line).value()
    except HydraException:
        return INVALID


def _exists(text: str) -> bool:
    return os.path.lexists(_home(text))


def _home(path: str) -> str:
    """The path, with the home directory for ~ if there is one."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        return path


def _expanded(key: str, path: str) -> str:
    """The path, with the home directory for ~ in the options of which Hydra makes a folder."""
    full = _home(path)
    if full.startswith("~"):
        raise UsageError(
            f"{key}={path}: expected ~/ or ~ and a known user; write {override(key, f'./{path}')} for a name"
            " that begins with ~"
        )
    return full if key in FOLDERS else path


def _is_list(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _elements(text: str) -> list[str]:
    """The elements of a list of paths, split at commas, without quotes around them."""
    return [re.sub(r"""^(['"])(.*)\1$""", r"\2", one.strip()) for one in text[1:-1].split(",")]


def _quoted(text: str) -> str:
    return f"[{','.join(map(quote, _elements(text)))}]"
