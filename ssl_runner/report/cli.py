"""TODO report.cli"""

import argparse
import os
import sys
from pathlib import Path

from ssl_runner.errors import UsageError
from ssl_runner.report import page, plots
from ssl_runner.report.read import Run, read_runs
from ssl_runner.report.tables import effect, finished, runs_table, summarise, swept, terminal


def main() -> None:
    """The console script. Exits with 0 when the report is written, with 1 and one line when it cannot be."""
    parser = argparse.ArgumentParser(prog="ssl-report", description=__doc__)
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="+", type=Path, help="runs lie in or below it, as below outputs"
    )
    parser.add_argument(
        "--out", type=Path, help="the folder to write to (default: report in the first FOLDER)"
    )
    args = parser.parse_args()
    out = args.out or args.folders[0] / "report"
    try:
        runs = read_runs(args.folders, without=out)
        print(report(runs, out, title=", ".join(folder.resolve().name for folder in args.folders)))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def report(runs: list[Run], out: Path, title: str) -> str:
    """Writes runs.csv, the plots and report.html into `out`; returns what to say on the terminal. UsageError when it cannot."""

    keys = swept(runs)
    table = runs_table(runs, keys)
    results = finished(table, keys)
    keys.sort(key=lambda key: -effect(results, key))
    summary = summarise(results, keys)
    pictures = plots.draw(runs, table, results, keys)
    html = page.render(title, runs, table, summary, keys, {name: svg for name, (svg, _) in pictures.items()})
    texts = {
        "runs.csv": table.to_csv(index=False),
        "report.html": html,
        **{f"{name}.svg": svg for name, (svg, _) in pictures.items()},
    }
    files = {name: text.encode(errors="replace") for name, text in texts.items()}
    files |= {f"{name}.png": png for name, (_, png) in pictures.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(out / name, content)
        for name in set(plots.NAMES) - set(pictures):  # an earlier report's
            (out / f"{name}.svg").unlink(missing_ok=True)
            (out / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out={out} cannot be written ({error.strerror}): give a folder that you may write to"
        ) from error
    told = terminal(table, summary, keys)
    return f"{told}\nwritten to {out}: {', '.join(sorted(files))}"


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
