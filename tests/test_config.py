"""What the command line refuses, as a user sees it: one line, exit code 1, nothing written."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ssl_runner.source import mnist5k

REFUSED = [
    # another loss's setting
    (
        "loss=simclr gamma=25",
        "gamma is a setting of loss=vicreg, not of loss=simclr (settings: tau, reduction)",
    ),
    ("loss=simclr +gamma=25", "gamma is a setting of loss=vicreg, not of loss=simclr"),
    (
        "loss=vicreg tau=0.5",
        "tau is a setting of loss=simclr, not of loss=vicreg (settings: alpha, beta, gamma, variance)",
    ),
    ("loss=simclr alpha=1", "alpha is a setting of loss=barlow and loss=vicreg, not of loss=simclr"),
    ("-m loss=vicreg,simclr gamma=1,25", "gamma is a setting of loss=vicreg, not of loss=simclr"),
    # unknown keys and choices
    ("epoch=3", "epoch is not a setting; did you mean epochs?"),
    ("-m epoch=3,4", "epoch is not a setting; did you mean epochs?"),
    ("lr=0.1", "did you mean optimizer.lr?"),
    ("projector.k=8", "did you mean projector.K?"),
    ("los=simclr", "did you mean loss?"),
    (
        "loss=simclrr",
        "loss=simclrr is not a choice; did you mean simclr?; loss is one of barlow, simclr, simclr_squared, vicreg",
    ),
    ("optimizer=adam", "optimizer is one of adamw, lars, sgd"),
    ("experiment=nope", "experiment=nope is not a choice"),
    ("+something=1", "something is not a setting"),
    ("++something=1", "something is not a setting"),
    (
        "dataset.root=/x",
        "dataset.root is a setting of dataset=cifar10 and dataset=cifar100 and dataset=folder and dataset=stl10",
    ),
    ("views.policies.all.flip=0.5", "+views.policies.all.flip=0.5 adds an argument"),
    ("loss.gamma=3", "loss.gamma=3: set it at the root, gamma=3"),
    ("~loss", "loss is one of barlow, simclr, simclr_squared, vicreg"),
    ("loss=null", "loss=null: loss is one of barlow, simclr, simclr_squared, vicreg"),
    ("'loss=[vicreg,simclr]'", "loss is one of barlow, simclr, simclr_squared, vicreg"),
    ("--foo", "unrecognized arguments: --foo"),
    # types
    ("gamma=abc", "gamma=abc: gamma is a number >= 0"),
    ("-m gamma=1,abc", "gamma=abc: gamma is a number >= 0"),
    ("gamma=[1]", "gamma is a number >= 0"),
    ("gamma=null", "gamma=null: gamma is a number >= 0"),
    ("gamma=nan", "gamma=nan: gamma is a number >= 0"),
    ("epochs=2.5", "epochs is an integer >= 1"),
    ("views.sizes=16", "views.sizes=16: views.sizes is a list of integers >= 4, such as [16,24,32], or null"),
    ("views.sizes=[16,2]", "views.sizes=[16,2]: views.sizes is a list of integers >= 4"),
    ("compile=maybe", "compile=maybe: compile is true or false"),
    ("channels_last=1", "channels_last is true or false"),
    ("backbone.widths=8", "backbone.widths=8: backbone.widths is a list"),
    ("projector=3", "projector=3: projector is one of identity, linear, mlp"),
    ("dataset.name=[a]", "dataset.name is text"),
    # ranges
    ("V=true", "V=true: V is an integer >= 2"),
    ("V=1", "V=1: V is an integer >= 2"),
    ("epochs=0", "epochs is an integer >= 1"),
    ("batch_size=0", "batch_size is an integer >= 1"),
    ("seed=-1", "seed is an integer from 0 to 4294967295"),
    ("gamma=-1", "gamma is a number >= 0"),
    ("loss=simclr tau=0", "tau=0: tau is a number > 0"),
    ("loss=simclr reduction=none", "reduction is one of mean, sum"),
    ("variance=soft", "variance is one of hinge, squared"),
    ("projector.K=0", "projector.K is an integer >= 1"),
    ("projector.depth=0", "projector.depth is an integer >= 1"),
    ("optimizer.lr=0", "optimizer.lr is a number > 0"),
    ("optimizer.clip=-1", "optimizer.clip is a number > 0 or null"),
    ("optimizer.final_lr=2", "optimizer.final_lr is a number from 0 to 1"),
    ("optimizer.warmup_epochs=20 epochs=10", "optimizer.warmup_epochs=20 is more than epochs=10"),
    ("dataset.val=1", "dataset.val is a number above 0 and up to 0.9"),
    ("dataset.subset=0", "dataset.subset is an integer >= 1 or null"),
    ("dataset.location=disk", "dataset.location is one of auto, device, host"),
    ("precision=fp8", "precision is one of auto, fp32, bf16, fp16"),
    ("device=gpu", "device is one of auto, cpu, cuda, cuda:<number>, mps"),
    ("views_forward=both", "views_forward is one of joint, separate"),
    ("probe.probes=[svm]", "probe.probes is a list of different ones of linear, knn"),
    ("probe.features=[]", "probe.features is a list of different ones of backbone"),
    ("probe.features=[pixels]", "probe.features=[pixels] lacks backbone"),
    ("relation=neighbors relation.k=0", "relation.k is an integer >= 1"),
    ("relation=neighbors relation.queue=-1", "relation.queue is an integer >= 0"),
    (
        "relation.k=3",
        "relation.k is a setting of relation=neighbors, not of relation=views (settings: normalized)",
    ),
    ("relation=noisy relation.p=1.5", "relation.p is a number from 0 to 1"),
    ("relation=noisy relation.of=noisy", "relation.of is one of views, labels, neighbors, edges"),
    ("relation=noisy relation.of=neighbors +relation.k=0", "relation.k is an integer >= 1"),
    ("-m relation=noisy relation.of=neighbors +relation.k=1,0", "relation.k is an integer >= 1"),
    (
        "solver.passes=3",
        "solver.passes is a setting of solver=closed_form, not of solver=gradient (settings: none)",
    ),
    ("solver=closed_form solver.ridge=-1", "solver.ridge is a number >= 0"),
    (
        "solver=closed_form solver.name=gradient",
        "solver.name=gradient is not a setting: choose it by solver=gradient",
    ),
    (
        "backbone=linear solver.name=closed_form",
        "solver.name=closed_form is not a setting: choose it by solver=closed_form",
    ),
    (
        "solver=closed_form backbone=linear projector=mlp",
        "projector=mlp: solver=closed_form backbone=linear solves for the backbone",
    ),
    (
        "solver=closed_form backbone=linear projector.K=32",
        "projector.K=32: solver=closed_form backbone=linear solves for the",
    ),
    (
        "-m solver=gradient,closed_form backbone=linear projector.K=32",
        "projector.K=32: solver=closed_form backbone=linear",
    ),
    (
        "solver=closed_form backbone=linear weights=x.safetensors",
        "weights=x.safetensors: solver=closed_form backbone=linear",
    ),
    ("solver=closed", "solver=closed is not a choice; did you mean closed_form?"),
    ("diagnostics.every=-1", "diagnostics.every is an integer >= 0"),
    ("diagnostics.images=1", "diagnostics.images is an integer >= 2"),
    ("diagnostics.moments=-1", "diagnostics.moments is an integer >= 0"),
    ("probe.every=-1", "probe.every is an integer >= 0"),
    # grammar
    ("gamma", "settings are written group=choice or key=value"),
    ("=3", "=3 names no setting"),
    ("-m gamma=range(1,0)", "a sweep over nothing"),
    ("probe.probes=[knn,knn]", "different ones of linear, knn"),
    ("gamma=1,2", "gamma=1,2 is a sweep: add -m"),
    ("+epochs=3", "write epochs=3"),
    ("~epochs", "epochs cannot be removed"),
    ("--config-dir nowhere", "nowhere is not a folder"),
    # resume
    ("resume=nowhere", "nowhere is not the folder of a run"),
    ("-m resume=nowhere seed=0,1", "leave out -m"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[command for command, _ in REFUSED])
def test_refused_before_any_work(ssl_run, tmp_path: Path, command: str, message: str) -> None:
    code, out, err = ssl_run(command)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == []


REFUSED_BY_THE_RUN = [
    ("batch_size=4000", "batch_size=4000: mnist5k has 3600 images to pretrain on; give at most as many"),
    ("dataset.subset=5", "give a number from 10 to 4000"),
    ("dataset.subset=10", "leaves a class without an image"),
    ("dataset=folder", "dataset.root=None is not a folder"),
    ("dataset=folder dataset.root=nowhere", "dataset.root=nowhere is not a folder"),
    ("views.policies.all.affine.scale=[2,1]", "affine.scale=[2, 1] is not a pair [low, high]"),
    ("+views.policies.all.flip=2", "policy.flip=2 is not a number from 0 to 1"),
    ("backbone=timm backbone.name=resnett18", "did you mean resnet18"),
    ("+optimizer.nesterof=true", "optimizer: AdamW.__init__() got an unexpected keyword argument 'nesterof'"),
    ("+dataset.sbset=5", "mnist5k() got an unexpected keyword argument 'sbset'"),
    ("device=cuda:99", "device=cuda:99: this machine has"),
    ("relation=edges", "relation.path=None is not a file: give a CSV or npz"),
    ("relation=edges relation.path=pairs.csv", "relation.path=pairs.csv is not a file"),
    (
        "relation=neighbors relation.k=9 relation.queue=9",
        "queue=9: give k >= 1 neighbours, and a queue of 0 or of more than k",
    ),
    (
        "relation=neighbors relation.k=128",
        "batch_size=128: relation=ssl_runner.relate.Neighbors seeks neighbours within the batch",
    ),
    (
        "relation=noisy relation.of=neighbors +relation.k=128",
        "and needs 129 originals in it; give at least as many, or a smaller",
    ),
    ("relation=noisy +relation.k=3", "of=labels takes no k (settings: none)"),
    (
        "relation=noisy relation.of=neighbors +relation.queue=9",
        "queue=9: what a queue holds cannot be rewired; set queue=0",
    ),
    ("relation=noisy relation.of=edges", "relation.path=None is not a file: give a CSV or npz"),
    (
        "solver=closed_form relation=neighbors relation.queue=9",
        "solver=closed_form relates rows of one batch: set relation.queue=0",
    ),
    (
        "diagnostics.moments=3 relation=neighbors relation.queue=9",
        "diagnostics.moments=3 relates rows of one batch: set relation.",
    ),
    (
        "weights=nowhere.safetensors",
        "weights=nowhere.safetensors is not a file: give the backbone.safetensors of a finished run",
    ),
    ("weights=.", "weights=. is a folder: give the backbone.safetensors of a finished run"),
    (
        "solver=closed_form projector=mlp",
        "solver=closed_form finds one matrix on top of the backbone: use projector=linear",
    ),
    ("solver=closed_form precision=bf16", "precision=bf16: solver=closed_form computes in fp32 and fp64"),
    (
        "diagnostics.moments=3",
        "diagnostics.moments is for a linear model: use backbone=linear projector=identity",
    ),
    ("backbone.widths=[]", "backbone.widths=[] is not a list of integers >= 1"),
    ("optimizer.betas=[2,3]", "optimizer: Invalid beta parameter"),
]


@pytest.mark.parametrize(
    ("command", "message"), REFUSED_BY_THE_RUN, ids=[command for command, _ in REFUSED_BY_THE_RUN]
)
def test_refused_by_the_run_before_it_trains(ssl_run, tmp_path: Path, command: str, message: str) -> None:
    """What only the data or the libraries can tell: refused before the first step, and told in run.json too."""
    code, out, err = ssl_run(f"device=cpu {command}")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("metrics.csv")) == []
    [record] = tmp_path.rglob("run.json")
    assert '"status": "failed"' in record.read_text()


def test_what_a_data_set_does_not_allow_stops_a_sweep_before_its_first_job(ssl_run, tmp_path: Path) -> None:
    """Pairs of the test set only: the first 1,000 rows of the digits' fixed order."""
    (tmp_path / "pairs.csv").write_text(
        "i,j\n" + "\n".join(f"{i},{j}" for i, j in pairwise(mnist5k().test[:100]))
    )
    for command, message in (
        (
            "relation=edges relation.path=pairs.csv,pairs.csv",
            "pairs.csv: no pair is of two of the 3600 images to pretrain on",
        ),
        (
            "relation=noisy relation.of=edges +relation.path=pairs.csv seed=0,1",
            "no pair is of two of the 3600 images",
        ),
        ("relation=neighbors relation.k=1,200", "needs 201 originals in it"),
        (
            "solver=closed_form relation=neighbors relation.queue=0,9",
            "relates rows of one batch: set relation.queue=0",
        ),
    ):
        code, out, err = ssl_run(f"-m device=cpu {command}")
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1
        assert list(tmp_path.rglob("run.json")) == []


def test_a_loss_without_a_closed_form_is_refused_where_one_is_needed(
    ssl_run, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "own.py").write_text(
        "from ssl_runner.loss import Loss\n"
        "class Pull(Loss):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weights = {'distance': 1.0}\n"
        "    def _terms(self, Z, G):\n"
        "        return {'distance': ((G.degrees[:, None] * Z - G @ Z) * Z).mean()}\n"
    )
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "pull.yaml").write_text("# @package _global_\nloss: {_target_: own.Pull}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for asked, solver in (
        ("solver=closed_form", "solver=closed_form"),
        ("diagnostics.moments=3", "projector=identity"),
    ):
        code, out, err = ssl_run(
            f"--config-dir mine -m loss=vicreg,pull backbone=linear {solver} {asked} device=cpu"
        )
        assert (code, out) == (1, "")
        assert err.startswith(
            f"{asked}: Pull has no closed linear form; vicreg, simclr, simclr_squared and barlow have"
        )
        assert err.count("\n") == 1
        assert list(tmp_path.rglob("run.json")) == []


def test_an_experiment_file_is_checked_like_the_command_line(ssl_run, tmp_path: Path) -> None:
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    header = "# @package _global_\ndefaults:\n  - override /loss: simclr\n"
    for name, text, message in [
        ("other", "gamma: 25", "gamma is a setting of loss=vicreg, not of loss=simclr"),
        ("typo", "epoch: 3", "epoch is not a setting; did you mean epochs?"),
        (
            "nested",
            "dataset: {sbset: 3}\nprobe: {evry: 3}",
            "probe.evry is not a setting; did you mean every?",
        ),
        ("type", "epochs: many", "epochs=many: epochs is an integer >= 1"),
        ("flat", "probe: 3", "probe is a group of settings"),
        ("resume", "resume: somewhere", "resume=somewhere stands in a file"),
        ("text", "epochs: '3'", "epochs='3': epochs is an integer >= 1"),
        ("range", "tau: -1", "tau=-1: tau is a number > 0"),
        (
            "solver",
            "solver: {name: closed_form}",
            "solver.name=closed_form is not a setting: choose it by solver=closed_form",
        ),
    ]:
        (experiments / f"{name}.yaml").write_text(header + text + "\n")
        code, out, err = ssl_run(f"--config-dir mine experiment={name}")
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


def test_gamma_reaches_vicreg(ssl_run) -> None:
    code, out, _ = ssl_run("loss=vicreg gamma=7 --cfg job --resolve")
    assert code == 0
    assert "gamma: 7\n  variance: hinge\nbackbone" in out


def test_cfg_and_help_need_no_torch() -> None:
    """In a fresh process: torch is the second that `--cfg job` and `--help` may take."""
    for option in ("--help", "--cfg=job"):
        script = (
            f"import sys; sys.argv = ['ssl-run', {option!r}]\n"
            "from ssl_runner.cli import main\n"
            "try: main()\n"
            "finally: print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"
        assert "batch_size: 128" in done.stdout
