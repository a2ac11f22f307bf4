"""Report on runs: read every run below FOLDER and write runs.csv, plots and report.html."""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from ssl_runner import console
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.report import label_free
from ssl_runner.report.best import best_command
from ssl_runner.report.read import Run, read_runs
from ssl_runner.report.tables import effect, finished, runs_table, summarise, swept_keys
from ssl_runner.report.terminal import format_terminal
from ssl_runner.runs.files import atomic_write

INTERVAL = 30  # seconds between reports with --watch


def main() -> None:
    """Console script `ssl-report`. Exits with 1 and one line on standard error on failure."""
    parser = argparse.ArgumentParser(prog="ssl-report", description=__doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="contains runs, at any depth")
    parser.add_argument("--out", type=Path, help="output folder (default: report in the first FOLDER)")
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        help="only runs with this tag; may be repeated: with all of them",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="print the configuration with the best validation top-1 as a command line, and write nothing",
    )
    parser.add_argument("--watch", action="store_true", help=f"repeat every {INTERVAL} s, until Ctrl-C")
    args = parser.parse_args()
    console.call(lambda: watch(args) if args.watch else print(execute(args), flush=True))


def execute(args: argparse.Namespace) -> str:
    """Read the runs, write the report unless `--best` is given, and return the text for the terminal."""
    out = args.out or args.folders[0] / "report"
    runs = tagged(read_runs(args.folders, without=out), args.tag)
    if args.best:
        return best_command(runs)
    return report(runs, out, title=", ".join(folder.resolve().name for folder in args.folders))


def tagged(runs: list[Run], tags: list[str]) -> list[Run]:
    """The runs that have all the tags. Raises UsageError if there is none."""
    chosen = [run for run in runs if set(tags) <= set(run.tags)]
    if not chosen:
        found = ", ".join(sorted({tag for run in runs for tag in run.tags})) or "none"
        raise UsageError(
            f"--tag={' --tag='.join(tags)}: expected tags of a run, found {found}; choose from these"
        )
    return chosen


def watch(args: argparse.Namespace) -> None:
    """Repeat `execute` until Ctrl-C, also after a UsageError, such as that of a folder without runs."""
    clear = "\033[2J\033[H" if sys.stdout.isatty() else ""
    with suppress(KeyboardInterrupt):
        while True:
            try:
                text = execute(args)
            except UsageError as error:
                text = str(error)
            print(f"{clear}{time.strftime('%H:%M:%S')}  every {INTERVAL} s, Ctrl-C ends\n{text}", flush=True)
            time.sleep(INTERVAL)


def report(runs: list[Run], out: Path, title: str) -> str:
    """Write the report into `out` and return its summary for the terminal.

    Raises UsageError if it cannot be written.
    """
    from ssl_runner.report import page, plots  # import matplotlib, which is slow, after the arguments' check

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
