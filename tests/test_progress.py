"""Progress lines where there is no terminal."""

import re

import pytest
import torch

from ssl_runner import progress
from ssl_runner.progress import image_progress
from tests.helpers import TINY, raising, run_folder, table


def test_lines_count_the_items_of_an_iterable(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress.progress(range(5), "probe"):
        now[0] += 20.0
    assert re.findall(r"probe: (\S+)", capsys.readouterr().err) == ["1/5", "3/5", "5/5"]


def test_lines_come_after_10_seconds_and_then_every_30(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with image_progress("pretrain", 20_000, done=1_000) as bar:
        for second in range(1, 101):
            now[0] = float(second)
            bar.set_postfix({"loss": f"{second}", "val": "0.9"}, refresh=False)
            bar.update(100)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"loss=(\d+)", line)[1] for line in lines] == ["10", "40", "70", "100"]
    assert re.fullmatch(
        r"pretrain: 5000/20\.0k \(25%\), 100 images/s, 02:(29|30) left, loss=40, val=0\.9", lines[1]
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_slow_work_is_in_images_per_second(capsys, monkeypatch, terminal) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with image_progress("pretrain", 200) as bar:
        now[0] = 20.0
        bar.update(8)
    err = capsys.readouterr().err
    assert "0.40 images/s" in err
    assert " 8/200 " in err


def test_short_or_hidden_work_writes_nothing(capsys) -> None:
    for hidden in (False, True):
        with image_progress("embed", 10, hidden=hidden) as bar:
            bar.update(10)
    assert list(progress.progress(range(3), "probe")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_terminal_gets_a_bar(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with image_progress("embed", 10) as bar:
        bar.update(10)
    assert "\r" in capsys.readouterr().err


def test_lines_of_training_show_epoch_loss_and_validation_accuracy(ssl_run, monkeypatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 1e-9)  # 0 writes a line before the first step
    monkeypatch.setattr(progress, "LINES", 0.0)
    code, out, err = ssl_run(f"{TINY} epochs=2 probe.every=1")
    assert code == 0
    first, *_, last = [line for line in err.splitlines() if line.startswith("pretrain")]
    assert re.search(r"^pretrain, epoch 1 of 2: .* images/s, \d\d:\d\d left, loss=[\d.e+]+$", first)
    val = float(table(run_folder(out) / "probe.csv")[0]["top1"])
    assert re.search(rf"^pretrain, epoch 2 of 2: .*, val={val:.4f}$", last)


def test_the_first_compilation_of_a_view_kernel_is_announced_once(capsys, monkeypatch) -> None:
    numba = pytest.importorskip("numba")
    from ssl_runner.views import cpu_kernels

    notice = cpu_kernels.notice
    monkeypatch.setattr(notice, "written", False)

    def call(module):
        def double(x):
            return 2 * x

        double.__module__ = module
        assert numba.njit(double)(2) == 4
        return capsys.readouterr().err

    assert call("a_module_of_the_user") == ""
    assert call(cpu_kernels.__name__) == "view kernels: compiling for this machine, once, about 10 s\n"
    assert call(cpu_kernels.__name__) == ""
    monkeypatch.setattr(notice, "written", False)
    monkeypatch.setattr(notice, "cached", True)
    with monkeypatch.context() as patch:
        patch.setattr(numba.core.caching.FunctionCache, "_impl_class", raising(RuntimeError("no locator")))
        kernel = cpu_kernels.compiled(cpu_kernels.convert.py_func)
    image = torch.zeros(1, 2, 2, dtype=torch.uint8).numpy()
    kernel(image, torch.zeros(1, 2, 2).numpy())
    assert capsys.readouterr().err == (
        "view kernels: compiling in every run, since no cache folder is writable, about 10 s;"
        " set NUMBA_CACHE_DIR to one that is\n"
    )
