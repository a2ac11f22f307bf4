"""Report on runs: read every run below FOLDER and write runs.csv, plots and report.html."""

import argparse
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from ssl_runner import console
from ssl_runner.data.skipped import printable
from ssl_runner.errors import UsageError
from ssl_runner.report import label_free
from ssl_runner.report.best import best_commands
from ssl_runner.report.comparisons import compare, table_of_configurations
from ssl_runner.report.read import Run, read_runs
from ssl_runner.report.terminal import format_terminal
from ssl_runner.runs.files import atomic_write

INTERVAL = 30  # seconds between reports with --watch
MAX_DRAWN = 8  # comparisons with figures


def parser() -> console.Parser:
    """Return the parser of the command line."""
    parser = console.Parser(prog="ssl-report", description=__doc__)
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
        help="print the configuration with the best validation top-1 on each data set as a command line, and"
        " write nothing",
    )
    parser.add_argument("--watch", action="store_true", help=f"repeat every {INTERVAL} s, until Ctrl-C")
    return parser


def main() -> None:
    """Entry point of `ssl-report`. Exit codes: 0, 1 after an error, 130 after Ctrl-C."""
    console.call(call)


def call() -> None:
    """Parse the command line, then do what it asks for."""
    args = parser().read()
    if args.watch:
        watch(args)
    else:
        print(execute(args), flush=True)


def execute(args: argparse.Namespace) -> str:
    """Read the runs, write the report unless `--best` is given, and return the text for the terminal."""
    out = args.out or args.folders[0] / "report"
    runs = tagged(read_runs(args.folders, without=out), args.tag)
    if args.best:
        return best_commands(compare(runs)[1])
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
    # after the arguments' check, because these import matplotlib, which is slow
    from ssl_runner.report import figures, page

    table, comparisons = compare(runs)
    correlations = label_free.correlations(comparisons)
    pictures = [figures.draw(part) for part in comparisons[:MAX_DRAWN]]
    text = page.render(title, out, runs, table, comparisons, correlations, pictures)
    files = {
        "runs.csv": table.to_csv(index=False).encode(errors="replace"),
        "configurations.csv": table_of_configurations(comparisons)
        .to_csv(index=False)
        .encode(errors="replace"),
        "report.html": text.encode(errors="replace"),
    }
    for number, drawn in enumerate(pictures, 1):
        suffix = f"-{number}" if number > 1 else ""
        for name, (_, contents) in drawn.items():
            files |= {f"{name}{suffix}.{kind}": content for kind, content in contents.items()}
    write(files, out, earlier=rf"({'|'.join(figures.FIGURES)})(-[0-9]+)?\.(svg|png)")
    summary = format_terminal(runs, table, comparisons, correlations)
    return f"{summary}\nwritten to {printable(out)}: {', '.join(sorted(files))}"


def write(files: dict[str, bytes], out: Path, earlier: str) -> None:
    """Write the files into `out`, and remove those of an earlier report, which match `earlier`.

    Raises UsageError if `out` cannot be written, or has files of these names and no report.
    """
    again = (out / "report.html").exists()
    if not again and (taken := sorted(name for name in files if (out / name).exists())):
        raise UsageError(
            f"--out={out}: expected a folder without {', '.join(taken)}, or one with a report; give"
            " another one"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(out / name) as file:
                file.write(content)
        for path in out.iterdir() if again else ():
            if path.name not in files and re.fullmatch(earlier, path.name):
                path.unlink()
    except OSError as error:
        raise UsageError(
            f"--out={out}: cannot write there ({error.strerror}); give a writable folder"
        ) from error
