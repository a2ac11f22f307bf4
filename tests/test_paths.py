"""Paths on the command line: values that are taken as they are, and those refused with quotes to paste."""

import io
import itertools
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ssl_runner import console
from ssl_runner.build import build_node
from ssl_runner.config import arguments, paths
from ssl_runner.config.compose import CONF, parse
from ssl_runner.errors import UsageError
from tests.helpers import TINY, run_folder

OPTIONS = ["dataset.root", "dataset.files", "init_weights", "resume", "relation.path", "relation.base.path"]
ODD = [
    *(
        "my images (1)",
        "a,b",
        "a=b",
        "runs/lr=0.1",
        "x[1]",
        "[1]",
        "a{b}",
        "{a}",
        "{a: 1}",
        "c#1",
        "it's",
        '"',
    ),
    *(
        "a;b",
        "a&b",
        "a!b",
        "a<b",
        "a`b",
        "a^b",
        "choice(a)",
        "'x'",
        "123",
        "1e3",
        "inf",
        " a",
        "a\\,b",
        "\\(",
    ),
    *("${x}", "d${x}", "\\${x}", "a,b ${x}", "日本,1", "a\nb"),
]
PLAIN = ["q$x", "a b", "a:b", "a@b", "x%y", "-x", "a\\b", "../x", "a+b", "2024/june", "..."]
CLEAR = ["日本", "café", "Ωmega/x", "~/x", "~/日本 1", "a~b", "caf\udce9", "naïve-1.0"]


def value(line: str) -> Any:
    """The value that a run gets from an override."""
    [result] = OmegaConf.to_container(OmegaConf.create([parse([line])[0].value()]), resolve=True)
    return result


@pytest.mark.parametrize("text", [*ODD, *PLAIN, *CLEAR])
def test_existing_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path(text).expanduser().mkdir(parents=True)
    given = [f"{option}={text}" for option in OPTIONS]
    for line in paths.complete(given):
        assert value(line) == text
    folder = Path(text).expanduser()
    [line] = paths.complete([f"hydra.run.dir={text}"])  # Hydra does not expand ~
    assert value(line) == str(folder)
    if "," not in text and text not in ('"', "'x'", " a"):
        assert value(paths.complete([f"dataset.root=[{text},{text}]"])[0]) == [text, text]
    line = paths.override("resume", text)
    assert value(shlex.split(line)[0]) == text


@pytest.mark.parametrize("text", [*PLAIN, *CLEAR])
def test_clear_path_need_not_exist(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    assert value(paths.complete([f"dataset.root={text}"])[0]) == text
    assert value(paths.complete([f"hydra.run.dir={text}"])[0]) == text.replace("~/", "/nowhere/")


REFUSED = {
    **{
        "my images (1)": "(",
        "a=b": "=",
        "runs/lr=0.1": "=",
        "x[1]": "[",
        "a{b}": "{",
        "c#1": "#",
        "it's": "'",
    },
    **{'"': '"', "a;b": ";", "a&b": "&", "a!b": "!", "a<b": "<", "a`b": "`", "a(b)": "(", "日本 (1)": "日"},
    **{"'": "'", "[": "[", "it's d${x}": "'"},
}


@pytest.mark.parametrize("key", ["dataset.root", "hydra.run.dir"])
@pytest.mark.parametrize("text", REFUSED)
def test_missing_path_with_special_characters_is_printed_in_quotes(key: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(paths.complete([f"{key}={text}"]))
    message = str(error.value)
    assert message.startswith(
        f"{key}={text}: expected quotes around a value that contains {REFUSED[text]!r};"
    )
    [pasted] = shlex.split(message.partition("; write ")[2])
    assert value(pasted) == text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dataset.root=null", None),
        ("resume=auto", "auto"),
        ("probe.cache=true", True),
        ("dataset.root=${oc.env:DATA}/x", "/data/x"),
        ("dataset.root='${oc.env:DATA}/x'", "/data/x"),
        ("dataset.root='a,b'", "a,b"),
        ("dataset.root=[a,b]", ["a", "b"]),
        ("dataset.root=['a, b',c]", ["a, b", "c"]),
        ("gamma=10", 10),
        ("+note=10", 10),
        ("dataset.root=10", 10),  # refused by its rule
    ],
)
def test_other_values_keep_their_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: object
) -> None:
    """Also if files have the names of values of options that are not paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data")
    for name in ("null", "true", "auto"):
        Path(name).touch()
    assert value(paths.complete([line])[0]) == expected


@pytest.mark.parametrize("line", ["dataset.root=~nobody-here/x", "hydra.run.dir='~nobody-here'"])
def test_home_of_an_unknown_user_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"expected ~/ or ~ and a known user; write .*\./~nobody-here"):
        paths.complete([line])


def test_path_that_is_also_a_sweep_is_refused_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    with pytest.raises(UsageError) as error:
        paths.complete(["dataset.root=a,b"], multirun=True)
    one, other = str(error.value).partition("; write ")[2].split(" for this path, or ")
    assert value(shlex.split(one)[0]) == "a,b"
    [sweep] = parse([shlex.split(other)[0]])
    assert sweep.is_sweep_override()
    assert paths.complete(["dataset.root=a,c"], multirun=True) == ["dataset.root=a,c"]


def test_quotes_keep_every_text() -> None:
    """All texts of up to two of the characters that quotes, escapes and interpolations consist of."""
    texts = ["".join(text) for n in (1, 2) for text in itertools.product("\\'\"${", repeat=n)]
    for text in [*texts, *(f"{text}${{x}}" for text in texts)]:
        line = f"dataset.root={paths.quote(text)}"
        assert value(line) == text
        assert str(paths.unquoted(parse([line])[0].value())) == str(Path(text))
        assert shlex.split(paths.in_shell(line)) == [line]


def test_texts_with_interpolations_reach_the_target(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"a": r"\${x}", "b": [r"d\${x}", {"c": r"\\\${x}"}], "d": "${e}", "e": 5})
    cfg["_target_"] = "builtins.dict"
    literal = {"a": "${x}", "b": ["d${x}", {"c": "\\${x}"}], "d": 5, "e": 5}
    cfg = paths.resolved(paths.resolved(cfg))
    assert build_node("part", cfg) == literal
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert build_node("part", OmegaConf.load(tmp_path / "config.yaml")) == literal


@pytest.mark.parametrize(
    ("words", "write"),
    [
        ("--gamma=25", "write gamma=25,"),
        ("--gamma 25", "write gamma=25,"),
        ("-gamma=25", "write gamma=25,"),
        ("epochs=3 --batch-size 8 loss=simclr", "write batch_size=8,"),
        ("--optimizer.lr=1e-3", "write optimizer.lr=1e-3,"),
        ("--shift -5", "write shift=-5,"),
        ("--loss=vicreg --gamma=5", "write loss=vicreg,"),
        ("'--note=a b'", 'write "note=a b",'),
        ("--compiled", "; list the options"),
        ("--compiled loss=simclr", "; list the options"),
        ("--compiled -m", "; list the options"),
    ],
)
def test_option_with_dashes_names_the_override(words: str, write: str) -> None:
    with pytest.raises(UsageError, match=r"expected an option of ssl-run; .*list the options") as error:
        arguments.parse(arguments.parser(), shlex.split(words))
    assert write in str(error.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "resume=a,b",
            "resume=a,b is a sweep: add -m for one run per value (in Python: a loop), or write a list",
        ),
        ("hydra.run.dir=a,b", """or quote a path as "hydra.run.dir='a,b'\""""),
        ("dataset=folder 'dataset.root=my images (1)'", """write "dataset.root='my images (1)'\""""),
        ("'resume=x (1)'", """write "resume='x (1)'\""""),
        ("--gamma=25", "write gamma=25, or list"),
        ("'gamma=(1'", "expected quotes around a value that contains '('"),
        (
            "'tags=[a'",
            """nothing after them; or write "tags='[a'\" for a text""",
        ),
        ("gamma=choice(1", "gamma=choice(1: expected complete brackets and quotes"),
        ("gamma = 25", "gamma: expected <group>=<name> or <key>=<value>, without spaces around ="),
        ("note=test(2)", """correct the call, or write "note='test(2)'\" for a text"""),
        ("gamma=intervall(1,2)", "gamma=intervall(1,2): Unknown function 'intervall'"),
    ],
)
def test_unreadable_override_ends_in_one_line(ssl_run, tmp_path: Path, command: str, message: str) -> None:
    code, out, err = ssl_run(command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_run_in_a_folder_with_an_odd_name_resumes(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "it's ${x}, [1]"
    (place / "日=${y} #2").mkdir(parents=True)
    monkeypatch.chdir(place)
    Path("c #1,%20${z}/loss").mkdir(parents=True)
    shutil.copy(CONF / "loss/vicreg.yaml", "c #1,%20${z}/loss/mine.yaml")
    words = ["--config-dir=c #1,%20${z}", "loss=mine", "hydra.run.dir=日=${y} #2"]
    code, out, err = ssl_run(f"{TINY} epochs=1 diagnostics.every=0 {shlex.join(words)}")
    assert code == 0, err
    assert run_folder(out) == place / "日=${y} #2"
    code, _, err = ssl_run(shlex.quote("hydra.run.dir=日=${y} #2"))
    assert code == 1
    code, out, err = ssl_run(err.partition("train it longer with ")[2])
    assert code == 0, err
    assert run_folder(out) == place / "日=${y} #2"
    assert len((place / "日=${y} #2/metrics.csv").read_text().splitlines()) == 3


def test_paths_are_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    console.call(lambda: print("run=日本 caf\udce9", flush=True))
    assert out.getvalue() == b"run=\\u65e5\\u672c caf\\udce9\n"
