"""The best configuration as a command line."""

import shlex
from pathlib import Path

from ssl_runner.config.run_id import changes_result
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.configurations import with_interval
from ssl_runner.report.read import Run, of_hydra, read_yaml, split_override


def best_commands(comparisons: list[Comparison]) -> str:
    """The command line of the configuration with the best mean validation top-1, of each comparison.

    Lines that begin with # precede it, so that a shell accepts the whole text. Test top-1 selects nothing.
    Raises UsageError if no finished run has a validation top-1.
    """
    found = [part for part in comparisons if part.summary.val_top1.notna().any()]
    if not found:
        raise UsageError("--best: expected a finished run with a validation top-1, found none; wait for one")
    titles = [[f"# {printable(part.title)}"] if len(found) > 1 else [] for part in found]
    return "\n".join(
        line for part, title in zip(found, titles, strict=True) for line in [*title, *best(part)]
    )


def best(part: Comparison) -> list[str]:
    """The lines of one comparison."""
    first = part.summary.iloc[0]
    comments = [
        f"# best of {len(part.summary)} by validation top-1 (test top-1 is not used):"
        f" {with_interval(first.val_top1, first['± val_top1'])}, seeds: {first.n:.0f}"
    ]
    members = [part.runs[row] for row in first["rows"]]
    if (cwd := str(members[0].record.get("cwd") or "")) not in ("", str(Path.cwd())):
        comments.append(f"# started in {' '.join(printable(cwd).split())}")
    return [*comments, printable(shlex.join(command(members, part.keys)))]


def command(members: list[Run], keys: list[str]) -> list[str]:
    """The words of a command that starts a run of the configuration that all `members` have.

    It has every override of a member whose value all members share, so that it has a seed only if there is
    one, and the values of `keys`, in which the configurations differ, also where a member had the default.
    """
    lines: dict[str, str] = {}
    for run in members:
        last = {split_override(line)[0]: line for line in overrides(run)}  # of several lines for a key
        lines = last | lines
    shared = {key: line for key, line in lines.items() if len({value(run, key) for run in members}) == 1}
    values = {key: value(members[0], key) for key in keys if key not in shared}
    defaults = [f"{key}={given}" for key, given in values.items() if given is not None]
    folders = [word for folder in config_dirs(members[0]) for word in ("--config-dir", folder)]
    return ["ssl-run", *folders, *shared.values(), *defaults]


def value(run: Run, key: str) -> str | None:
    """The choice of a group or the value of an option, equal for equal values."""
    return run.choices.get(key) or run.config.get(key)


def overrides(run: Run) -> list[str]:
    """The overrides of a run as written, without Hydra's own, its names and `resume`."""
    lines = read_yaml(run.path / ".hydra" / "overrides.yaml", list, [])
    lines = [str(line) for line in lines if not of_hydra(line)]
    return [line for line in lines if changes_result(split_override(line)[0])]


def config_dirs(run: Run) -> list[str]:
    """The --config-dir that a run was started with, if any."""
    node = read_yaml(run.path / ".hydra" / "hydra.yaml", dict, [])
    for name in ("hydra", "runtime", "config_sources"):
        node = node.get(name) if isinstance(node, dict) else None
    sources = [source for source in node if isinstance(source, dict)] if isinstance(node, list) else []
    return [str(source.get("path")) for source in sources if source.get("provider") == "command-line"]
