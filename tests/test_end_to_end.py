"""End-to-end runs from the command line: output files, determinism, sweeps, and resuming after a crash."""

import csv
import json
import re
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path

import hydra._internal.hydra
import pytest
import safetensors.torch
import torch
from hydra._internal.core_plugins import basic_launcher
from omegaconf import OmegaConf

from ssl_runner.runs import filenames
from ssl_runner.theory.diagnostics import Diagnostics
from tests.helpers import TINY, make_pictures, run_folder, start, table

BOTH = "probe.probes=[linear,knn]"


def test_run_writes_all_files(ssl_run, tmp_path: Path) -> None:
    features = "probe.features=[backbone,projector,random_init,pixels]"
    code, out, err = ssl_run(f"loss=vicreg gamma=7 {TINY} probe.every=1 {features} {BOTH}")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"top1=0\.\d{4} loss=[\d.e+-]+ run=/.*", out.splitlines()[-1])
    folder = run_folder(out)
    assert folder.relative_to(tmp_path).parts[:3] == ("outputs", "mnist5k", "vicreg")

    metrics = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    names = (
        "epoch step images_seen seconds images_per_s seconds_views seconds_step seconds_checkpoint lr loss"
        " variance covariance invariance seconds_evaluators"
    )
    assert list(metrics[0]) == [*names.split(), *Diagnostics.columns]
    assert [bool(row["rank"]) for row in metrics] == [False, True]  # every second epoch
    spectrum = table(folder / "spectrum.csv")
    assert [row["k"] for row in spectrum] == [str(k) for k in range(1, 9)]
    assert [row["epoch"] for row in metrics] == ["1", "2"]

    probes = table(folder / "probe.csv")
    columns = {
        "epoch",
        "probe",
        "features",
        "train_split",
        "eval_split",
        "selection",
        "n_train",
        "top1",
        "top5",
    }
    assert columns <= probes[0].keys()
    assert [(row["epoch"], row["eval_split"]) for row in probes[:2]] == [("1", "val")] * 2
    assert sum(row["eval_split"] == "test" for row in probes) == 8
    assert f"top1={float(probes[3]['top1']):.4f} " in out

    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    assert record["error"] is None
    assert record["device"] == "cpu"
    assert record["precision"] == "fp32"
    assert record["relation"]["normalized"] is False
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["wall_seconds"] > 0

    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert config.loss.gamma == config.gamma == 7
    assert "${" not in (folder / ".hydra" / "config.yaml").read_text()
    assert "gamma=7" in (folder / ".hydra" / "overrides.yaml").read_text()

    exported = safetensors.torch.load_file(folder / "backbone.safetensors")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {f"body.{name}" for name in exported} == state["backbone"].keys()
    assert all(torch.equal(exported[name], state["backbone"][f"body.{name}"]) for name in exported)
    exported = safetensors.torch.load_file(folder / "projector.safetensors")
    assert exported.keys() == state["projector"].keys()
    assert all(torch.equal(exported[name], state["projector"][name]) for name in exported)


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["fast", "profile"])
def test_debug_run_writes_its_files(debug: str, ssl_run) -> None:
    """`debug` wins over an experiment and loses to the command line."""
    size = "backbone.widths=[8,16] projector.width=16 projector.K=8 batch_size=20 device=cpu"
    code, out, _ = ssl_run(f"debug={debug} experiment=supervised_digits {size}")
    assert code == 0
    folder = run_folder(out)
    record = json.loads((folder / "run.json").read_text())
    assert record["tags"] == ["debug"]
    metrics = table(folder / "metrics.csv")
    assert [int(row["step"]) for row in metrics] == [{"fast": 9, "profile": 7}[debug]]
    files = {path.name for path in folder.iterdir()}
    assert files <= {*filenames.BEGIN, *filenames.REPLACED}
    if debug == "fast":
        assert {"views.png", "spectrum.csv"} <= files
        assert {row["probe"] for row in table(folder / "probe.csv")} == {"linear", "knn", "ridge"}
    else:
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        assert sum(event.get("name") == "aten::convolution_backward" for event in events) >= 7
        assert "aten::convolution_backward" in (folder / "profile.txt").read_text()


def test_exported_backbone_can_be_rebuilt_from_its_header(ssl_run) -> None:
    from hydra.utils import instantiate

    _, out, _ = ssl_run(TINY)
    path = run_folder(out) / "backbone.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["ssl_runner"])
    backbone = instantiate(header["backbone"], channels=header["channels"], image_size=header["image_size"])
    backbone.body.load_state_dict(safetensors.torch.load_file(path))
    assert len(header["mean"]) == header["channels"] == 1


@pytest.mark.parametrize(
    "loss", ["vicreg", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("simclr", "barlow"))]
)
def test_same_command_gives_same_csv(ssl_run, loss: str) -> None:
    folders = [run_folder(ssl_run(f"loss={loss} {TINY} {BOTH}")[1]) for _ in range(2)]
    assert folders[0] != folders[1]
    for name in ("metrics.csv", "probe.csv"):
        assert table(folders[0] / name) == table(folders[1] / name)
    other = run_folder(ssl_run(f"loss={loss} {TINY} seed=1")[1])
    assert table(other / "metrics.csv") != table(folders[0] / "metrics.csv")


@pytest.mark.parametrize(
    "settings",
    [
        "relation=labels optimizer=lars",
        "relation=labels relation.normalized=true V=3 precision=bf16",
        "loss=simclr relation.normalized=true V=4 precision=fp16",
        "loss=barlow center=true views=barlow optimizer=sgd optimizer.clip_grad_norm=1",
        "views=simclr dataset.storage=host channels_last=false",
        "views=vicreg optimizer=adamw +optimizer.eps=1e-6 projector.depth=1",
        "views=crop forward=per_view",
        "views.resolutions=[12,20,28]",
    ],
)
def test_run_succeeds_with_every_option(ssl_run, settings: str) -> None:
    code, out, err = ssl_run(f"{TINY} {settings}")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("top1=")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "backbone=linear views.resolutions=[16,28]",
            "views.resolutions=[16,28]: expected sizes that this backbone accepts, found 16 x 16",
        ),
        (
            "backbone=linear solver=closed_form views.resolutions=[28]",
            "views.resolutions=[28]: expected null for ClosedForm",
        ),
        (
            "views=multicrop backbone=vit_tiny",
            "views.policies.small.size=16: expected sizes that this backbone accepts, found 16 x 16",
        ),
    ],
)
def test_unsupported_resolutions_are_rejected(ssl_run, settings: str, message: str) -> None:
    code, _, err = ssl_run(f"dataset.subset=200 batch_size=50 device=cpu {settings}")
    assert code == 1
    assert message in err


@pytest.mark.slow
def test_noisy_accepts_every_base_relation_in_sweep(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("i,j\n" + "\n".join(f"{i},{i + 1}" for i in range(4999)))
    folders = []
    for settings in (
        "views,labels",
        "neighbors relation.base.k=1,3",
        "edges relation.base.path=pairs.csv relation.rewire_fraction=0,1",
    ):
        code, out, err = ssl_run(f"-m relation=noisy relation@relation.base={settings} {TINY}")
        assert (code, err) == (0, "")
        folders += [run_folder(line) for line in out.splitlines() if line.startswith("top1=")]
    losses = [table(folder / "metrics.csv")[-1]["loss"] for folder in folders]
    assert len(set(losses)) == len(losses) == 6
    records = [json.loads((folder / "run.json").read_text())["relation"]["pairs"] for folder in folders]
    assert records[:4] == [None] * 4
    assert records[4] == records[5] > 0


@pytest.mark.parametrize("settings", ["", "relation.queue=60"])
def test_neighbors_k_may_exceed_number_of_diagnostics_images(ssl_run, settings: str) -> None:
    """With k=25 and a diagnostics subset of 20 images, all images of the subset are positives."""
    code, out, err = ssl_run(
        f"relation=neighbors relation.k=25 {settings} {TINY} diagnostics.num_images=20 diagnostics.every=1"
    )
    assert (code, err) == (0, "")
    assert all(float(row["optimum_rank"]) >= 0 for row in table(run_folder(out) / "metrics.csv"))


@pytest.mark.parametrize(
    "settings",
    [
        "backbone=linear projector=identity",
        pytest.param("backbone=resnet18 projector.K=8", marks=pytest.mark.slow),
        pytest.param("backbone=vit_tiny projector.K=8", marks=pytest.mark.slow),
        "backbone=timm backbone.name=resnet10t projector.K=8",
    ],
)
def test_run_succeeds_with_every_backbone(ssl_run, tmp_path: Path, settings: str) -> None:
    # not side=16: the last feature map would be a single pixel, where bf16 can fail
    make_pictures(tmp_path / "pictures", train=20, test=4, side=32)
    tiny = (
        "epochs=1 batch_size=10 probe.probes=[knn] probe.features=[backbone] device=cpu embedding.method=none"
    )
    code, out, err = ssl_run(
        f"dataset=folder dataset.root=pictures dataset.val_fraction=0.2 {tiny} {settings}"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("top1=")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile emits warnings of its own
def test_compile_gives_same_training(ssl_run) -> None:
    outcomes = [ssl_run(f"{TINY} epochs=1 compile={flag}") for flag in ("false", "true")]
    assert [code for code, _, _ in outcomes] == [0, 0]
    runs = [run_folder(out) for _, out, _ in outcomes]
    plain, compiled = (table(folder / "metrics.csv") for folder in runs)
    assert float(compiled[0]["loss"]) == pytest.approx(float(plain[0]["loss"]), rel=1e-3)
    states = [safetensors.torch.load_file(folder / "backbone.safetensors") for folder in runs]
    assert states[0].keys() == states[1].keys()


def test_image_folder_run_reaches_perfect_accuracy(ssl_run, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", train=30, test=5, side=16)
    tiny = TINY.replace("dataset.subset=200", "").replace("batch_size=50", "batch_size=18")
    code, out, err = ssl_run(f"dataset=folder dataset.root=pictures views=crop {tiny} {BOTH}")
    assert (code, err) == (0, "")
    assert "top1=1.0000" in out
    assert table(run_folder(out) / "probe.csv")[0]["top5"] == ""


def test_custom_loss_needs_only_module_and_yaml(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of the custom loss are available at the root of the configuration."""
    (tmp_path / "mine.py").write_text(
        "from ssl_runner.loss import Loss\n"
        "class Pull(Loss):\n"
        "    def __init__(self, strength):\n"
        "        super().__init__()\n"
        "        self.weights = {'distance': strength, 'size': 1.0}\n"
        "    def _terms(self, Z, G):\n"
        "        distance = ((G.degrees[:, None] * Z - G @ Z) * Z).mean()\n"
        "        return {'distance': distance, 'size': (1 - Z.var(0)).square().sum()}\n"
    )
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    yaml = "# @package _global_\nstrength: 2.0\nloss: {_target_: mine.Pull, strength: '${strength}'}\n"
    (tmp_path / "conf" / "loss" / "pull.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = ssl_run(f"--config-dir conf loss=pull strength=3 {TINY}")
    assert (code, err) == (0, "")
    assert table(run_folder(out) / "metrics.csv")[0].keys() >= {"distance", "size"}
    code, _, err = ssl_run(f"--config-dir conf loss=pull gamma=3 {TINY}")
    assert (code, err) == (
        1,
        "gamma is an option of loss=frossl, loss=sigreg and loss=vicreg, not of loss=pull"
        " (options: strength)\n",
    )
    code, _, err = ssl_run(f"--config-dir conf loss=vicreg strength=3 {TINY}")
    assert code == 1
    assert "strength is an option of loss=pull, not of loss=vicreg" in err

    (tmp_path / "conf" / "loss" / "pull.yaml").write_text("_target_: mine.Pull\nstrength: 2.0\n")
    assert ssl_run(f"--config-dir conf loss=pull strength=3 {TINY}")[2] == (
        "strength: expected loss.strength, as in the YAML file of loss=pull; write loss.strength\n"
    )
    code, out, err = ssl_run(f"--config-dir conf loss=pull loss.strength=3 {TINY}")
    assert (code, err) == (0, "")
    for name, writer in {"alignment": "the loss", "lr": "the run itself"}.items():
        module = (tmp_path / "mine.py").read_text().replace("'distance'", f"'{name}'")
        (tmp_path / f"mine_{name}.py").write_text(module)
        target = f"loss._target_=mine_{name}.Pull diagnostics.every=1"
        code, out, err = ssl_run(f"--config-dir conf loss=pull {TINY} {target}")
        assert (code, out) == (1, "")
        assert f"no other column of metrics.csv has, but {writer} writes one of this name" in err


# --- sweeps -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_started_in_same_second_get_separate_folders(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a frozen clock, two sweeps of six runs and two single runs use fourteen different folders."""
    OmegaConf.register_new_resolver(
        "now", lambda form: datetime(2026, 1, 1).strftime(form), use_cache=True, replace=True
    )
    for module in (hydra._internal.hydra, basic_launcher):
        monkeypatch.setattr(module, "setup_globals", lambda: None)  # it would restore the real clock
    lines = []
    for command in 2 * [f"-m loss=vicreg gamma=1,5,25 seed=0,1 {TINY} epochs=1"] + 2 * [f"{TINY} epochs=1"]:
        code, out, err = ssl_run(command)
        assert (code, err) == (0, "")
        lines += [line for line in out.splitlines() if line.startswith("top1=")]
    folders = [run_folder(line) for line in lines]
    assert len(folders) == len(set(folders)) == 14
    assert all("2026-01-01_00-00-00" in str(folder) for folder in folders)
    swept = [OmegaConf.load(folder / ".hydra" / "config.yaml") for folder in folders[:12]]
    assert [(c.gamma, c.seed) for c in swept] == 2 * [(g, s) for g in (1, 5, 25) for s in (0, 1)]
    assert len({folder.parent for folder in folders[:12]}) == 2


def test_invalid_job_stops_sweep_before_start(ssl_run, tmp_path: Path) -> None:
    code, out, err = ssl_run(f"-m batch_size=50,5000,40 {TINY.replace('batch_size=50', '')}")
    assert (code, out) == (1, "")
    assert "batch_size=5000: expected at most 180, the pretraining images of mnist5k" in err
    assert err.endswith("(in the sweep's job batch_size=5000)\n")
    assert not list(tmp_path.rglob("run.json"))


def test_failed_job_does_not_stop_sweep_and_exit_code_is_one(ssl_run, tmp_path: Path) -> None:
    code, out, err = ssl_run(
        f"-m optimizer.lr=0.001,1e30,0.002 {TINY} optimizer=sgd optimizer.warmup_epochs=0"
    )
    assert code == 1
    assert sum(line.startswith("top1=") for line in out.splitlines()) == 2
    failure, summary = err.splitlines()
    assert failure.startswith("job #1 (optimizer.lr=1e+30): the loss is not finite")
    assert summary == "failed sweep jobs (1): #1 (optimizer.lr=1e+30)"
    states = [json.loads(path.read_text())["status"] for path in tmp_path.rglob("run.json")]
    assert sorted(states) == ["done", "done", "failed"]


def test_run_does_not_overwrite_existing_run(ssl_run, tmp_path: Path) -> None:
    command = f"{TINY} epochs=1 hydra.run.dir=outputs/mine"
    assert ssl_run(command)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    code, out, err = ssl_run(command + " seed=5")
    assert (code, out) == (1, "")
    assert err == (
        "outputs/mine already contains a run: choose another folder, or train it longer with"
        " resume=outputs/mine epochs=2\n"
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_run_resumes_to_same_result(ssl_run, tmp_path: Path) -> None:
    """After SIGKILL past epoch two, resume=<folder> gives the CSVs and weights of an uninterrupted run."""
    command = f"{TINY} epochs=40 projector.K=9 probe.every=1"
    process = start(f"{command} hydra.run.dir=outputs/killed", tmp_path, save_interval=0.05)
    killed = tmp_path / "outputs" / "killed"
    while process.poll() is None and not (
        (killed / "metrics.csv").exists() and len(table(killed / "metrics.csv")) >= 2
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= len(table(killed / "metrics.csv")) < 40
    with open(killed / "metrics.csv", "a") as file:
        file.write("41,17,torn li")  # a row truncated by a crash during the write

    code, out, err = ssl_run("resume=outputs/killed")
    assert (code, err) == (0, "")
    assert run_folder(out) == killed
    uninterrupted = run_folder(ssl_run(command)[1])
    for name in ("metrics.csv", "probe.csv"):
        assert table(killed / name) == table(uninterrupted / name)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (killed, uninterrupted)]
    for part in ("backbone", "projector"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())

    code, _, err = ssl_run("resume=outputs/killed")
    assert code == 1
    assert "this run is done" in err


def test_resume_with_changed_configuration_raises_and_keeps_files(ssl_run, tmp_path: Path) -> None:
    folder = run_folder(ssl_run(f"{TINY} epochs=1")[1])
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = ssl_run(f"resume={folder} gamma=3")
    assert (code, out) == (1, "")
    assert "Cannot change gamma (10.0 -> 3) when resuming" in err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    # status "failed" after the last epoch: only the probes are missing
    code, out, err = ssl_run(f"resume={folder} gamma=10.0")
    assert (code, err) == (0, "")
    assert table(folder / "probe.csv")[-1]["eval_split"] == "test"
    assert len(table(folder / "probe.csv")) == 2

    shutil.rmtree(folder / ".hydra")
    assert "expected the folder of a run" in ssl_run(f"resume={folder}")[2]


def test_resume_does_not_need_initial_weights_file(ssl_run, tmp_path: Path) -> None:
    weights = run_folder(ssl_run(f"{TINY} epochs=1")[1]) / "backbone.safetensors"
    folder = run_folder(ssl_run(f"{TINY} epochs=1 init_weights={weights}")[1])
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    weights.unlink()
    code, _, err = ssl_run(f"resume={folder}")
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_diagnostics_of_noisy_relation_are_unchanged_after_resume(ssl_run, tmp_path: Path) -> None:
    """The noise on the diagnostics subset is fixed, also if the base relation depends on Z."""
    command = f"{TINY} relation=noisy relation@relation.base=neighbors epochs=3"
    uninterrupted = run_folder(ssl_run(command)[1])
    folder = run_folder(ssl_run(command)[1])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["relation"].keys() == {"generator", "base"}
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    before = (folder / "spectrum.csv").read_text()
    code, _, err = ssl_run(f"resume={folder}")
    assert (code, err) == (0, "")
    assert (folder / "spectrum.csv").read_text() == before == (uninterrupted / "spectrum.csv").read_text()


@pytest.mark.slow
def test_concurrent_resume_runs_only_once(ssl_run, tmp_path: Path) -> None:
    """If two processes resume the same run at once, one resumes it and the other exits with an error."""
    command = f"{TINY} epochs=3"
    folder = run_folder(ssl_run(command)[1])
    expected = table(folder / "metrics.csv")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    processes = [start(f"resume={folder}", tmp_path) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 1], errors
    assert any(
        "in use by another process" in text or "still running" in text or "is done" in text for text in errors
    )
    assert table(folder / "metrics.csv") == expected
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_resume_works_from_another_directory(
    ssl_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are resolved against the directory in which the run was started."""
    make_pictures(tmp_path / "pictures", train=10, test=2, side=8)
    tiny = TINY.replace("subset=200", "val_fraction=0.2").replace("batch_size=50", "batch_size=8")
    code, out, err = ssl_run(f"dataset=folder dataset.root=pictures {tiny} hydra.run.dir=mine")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "mine" / "run.json").read_text())
    (tmp_path / "mine" / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = ssl_run("resume=../mine --config-dir .")
    assert (code, err) == (0, "")
    assert run_folder(out) == tmp_path / "mine"


@pytest.mark.slow
def test_resume_of_active_run_raises(ssl_run, tmp_path: Path) -> None:
    process = start(f"{TINY} epochs=2000 hydra.run.dir=outputs/alive", tmp_path)
    try:
        while process.poll() is None and not (tmp_path / "outputs" / "alive" / "metrics.csv").exists():
            time.sleep(0.05)
        code, _, err = ssl_run("resume=outputs/alive")
        assert code == 1
        assert f"still running as process {process.pid}" in err
    finally:
        process.kill()
        process.communicate()


def test_diverging_run_reports_step_and_is_marked_failed(ssl_run, tmp_path: Path) -> None:
    code, _, err = ssl_run(f"{TINY} epochs=3 optimizer=sgd optimizer.lr=1e12 optimizer.warmup_epochs=0")
    assert code == 1
    assert re.search(r"the loss is not finite at step \d+: ", err)
    assert err.count("\n") == 1
    [record] = tmp_path.rglob("run.json")
    assert json.loads(record.read_text())["status"] == "failed"
