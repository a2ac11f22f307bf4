"""Report on runs: read every run below FOLDER and write runs.csv, plots and report.html."""

import argparse
import sys
from pathlib import Path

from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.report.read import Run, read_runs
from ssl_runner.report.tables import effect, finished, runs_table, summarise, swept_keys
from ssl_runner.report.terminal import format_terminal
from ssl_runner.runs.files import atomic_write


def main() -> None:
    """Console script `ssl-report`. Exits with 1 and one line on standard error on failure."""
    parser = argparse.ArgumentParser(prog="ssl-report", description=__doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="contains runs, at any depth")
    parser.add_argument("--out", type=Path, help="output folder (default: report in the first FOLDER)")
    args = parser.parse_args()
    out = args.out or args.folders[0] / "report"
    try:
        runs = read_runs(args.folders, without=out)
        print(report(runs, out, title=", ".join(folder.resolve().name for folder in args.folders)))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def report(runs: list[Run], out: Path, title: str) -> str:
    """Write the report into `out` and return its summary for the terminal.

    Raises UsageError if it cannot be written.
    """
    from ssl_runner.report import (
        label_free,
        page,
        plots,
    )  # matplotlib loads slowly: not before the arguments are checked

    keys = swept_keys(runs)
    table = runs_table(runs, keys)
    results = finished(table, keys)
    keys.sort(key=lambda key: -effect(results, key))
    summary = summarise(results, keys)
    correlations = label_free.correlations(runs, results)
    pictures = plots.draw(runs, table, results, keys)
    files = {
        "runs.csv": table.to_csv(index=False).encode(errors="replace"),
        "report.html": page.render(title, runs, table, summary, keys, correlations, pictures).encode(
            errors="replace"
        ),
        **pictures,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(out / name) as file:
                file.write(content)
        for name in set(plots.FILES) - set(pictures):  # of an earlier report
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out={out}: cannot write there ({error.strerror}); give a writable folder"
        ) from error
    summary_text = format_terminal(runs, table, summary, keys, correlations)
    return f"{summary_text}\nwritten to {printable(out)}: {', '.join(sorted(files))}"
