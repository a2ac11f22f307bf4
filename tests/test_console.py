"""Arguments and messages of the console scripts."""

import io
import os
import sys
from types import ModuleType

import pytest

from ssl_runner import console
from ssl_runner.config import arguments
from ssl_runner.errors import UsageError, counted, format_error, listed
from ssl_runner.evaluation import embed_cli, probe_cli, relation_cli
from ssl_runner.report import cli as report_cli


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (
            report_cli,
            "runs --bst",
            "--bst: expected an option of ssl-report; write --best, or list the options",
        ),
        (report_cli, "runs --foo=3", "--foo=3: expected an option of ssl-report; list the options with"),
        (report_cli, "", "expected FOLDER; list the options with ssl-report --help"),
        (report_cli, "runs --tag", "--tag: expected a value; list"),
        (report_cli, "runs --best=3", "--best=3: expected no value; list"),
        (embed_cli, "run . -o a.csv --batch-size=x", "--batch-size=x: expected an integer; list"),
        (embed_cli, "run . -o a.csv --batchsize=8", "write --batch-size, or list"),
        (
            embed_cli,
            "run . -o a.csv --size 8",
            "--size: expected an option of ssl-embed; write size=8, or list",
        ),
        (probe_cli, "run --confg-dir=x", "write --config-dir, or list the options with ssl-probe --help"),
        (relation_cli, "--epochs=3", "expected an option of ssl-relation; write epochs=3, or list"),
        (arguments, "--cfg=jobs", "--cfg=jobs: expected one of "),
        (arguments, "--multirum", "expected an option of ssl-run; write --multirun, or list"),
    ],
)
def test_wrong_options_of_console_scripts_are_named(script: ModuleType, words: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        script.parser().read(words.split())
    assert message in str(error.value)


def test_numbers_and_names_in_messages() -> None:
    assert [counted(n, "epoch") for n in (0, 1, 2000)] == ["0 epochs", "1 epoch", "2,000 epochs"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
    assert [listed(names) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert listed("abc", "or") == "a, b or c"


def test_error_of_sbatch_has_one_line() -> None:
    FailedJobError = type("FailedJobError", (RuntimeError,), {})
    error = FailedJobError(
        "sbatch: error: invalid partition specified: x\nsbatch: error: Submission\nfailed\n"
    )
    assert format_error(error).startswith(
        "hydra/launcher=slurm: expected sbatch to submit the jobs, found 'error: Submission failed'; start"
    )


def test_lines_of_parallel_jobs_begin_with_their_number(capsys) -> None:
    with console.numbered("#1: "):
        print("job #1 (gamma=5)")
        print("a\nb", end="")
        print("warning", file=sys.stderr)
        assert not sys.stderr.isatty()
    print("after")
    assert capsys.readouterr() == ("job #1 (gamma=5)\n#1: a\n#1: b\nafter\n", "#1: warning\n")


def test_overwritten_line_of_a_parallel_job_is_written_once() -> None:
    written = io.StringIO()
    stream = console.Numbered(written, "#1: ")
    for text in ("\r 50%", "\r 70%\r", "100%", "\n", "a\r\nb\r", "\n", "\r  \r"):
        stream.write(text)
    assert (written.getvalue(), stream.line) == ("#1: 100%\n#1: a\n#1: b\n", "  \r")


def test_job_exits_only_if_its_own_stdout_is_closed(monkeypatch) -> None:
    """A BrokenPipeError can be that of a logger's connection, too."""
    reader, writer = os.pipe()
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", console.Numbered(stdout, "#1: "))
        console.exit_if_stdout_is_closed()
        os.close(reader)
        with pytest.raises(SystemExit):
            console.exit_if_stdout_is_closed()
        print("goes to os.devnull")
