"""Error messages of `ssl-run` for invalid input: one line on stderr, exit code 1, no files written."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ssl_runner.data.readers import mnist5k

INVALID = [
    # options of another loss
    (
        "loss=simclr gamma=25",
        "gamma is an option of loss=vicreg, not of loss=simclr (options: tau, reduction)",
    ),
    ("loss=simclr +gamma=25", "gamma is an option of loss=vicreg, not of loss=simclr"),
    (
        "loss=vicreg tau=0.5",
        "tau is an option of loss=simclr, not of loss=vicreg (options: alpha, beta, gamma, variance)",
    ),
    ("loss=simclr alpha=1", "alpha is an option of loss=barlow and loss=vicreg, not of loss=simclr"),
    ("-m loss=vicreg,simclr gamma=1,25", "gamma is an option of loss=vicreg, not of loss=simclr"),
    # unknown keys and choices
    ("epoch=3", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
    ("-m epoch=3,4", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
    ("lr=0.1", "Unknown option 'lr'. Did you mean 'optimizer.lr'?"),
    ("projector.k=8", "Did you mean 'projector.K'?"),
    ("los=simclr", "Did you mean 'loss'?"),
    (
        "loss=simclrr",
        "Unknown loss 'simclrr'. Did you mean 'simclr'? Available: barlow, simclr, spectral, vicreg",
    ),
    ("optimizer=adam", "Unknown optimizer 'adam'. Did you mean 'adamw'? Available: adamw, lars, sgd"),
    ("experiment=nope", "Unknown experiment 'nope'. Available: "),
    ("+something=1", "Unknown option 'something'. List all: ssl-run --cfg job"),
    ("++something=1", "Unknown option 'something'. List all: ssl-run --cfg job"),
    (
        "dataset.root=/x",
        "dataset.root is an option of dataset=cifar10 and dataset=cifar100 and dataset=folder and",
    ),
    ("views.policies.all.flip=0.5", "Add it as a new argument: +views.policies.all.flip=0.5"),
    ("loss.gamma=3", "loss.gamma=3: options of a loss are set at the top level; write gamma=3"),
    ("~loss", "~loss=null: expected loss=<name>; use one of barlow, simclr, spectral, vicreg"),
    ("loss=null", "loss=null: expected loss=<name>; use one of barlow, simclr, spectral, vicreg"),
    ("'loss=[vicreg,simclr]'", "expected loss=<name>; use one of barlow, simclr, spectral, vicreg"),
    ("--foo", "unrecognized arguments: --foo"),
    # types
    ("gamma=abc", "gamma=abc: expected a number >= 0"),
    ("-m gamma=1,abc", "gamma=abc: expected a number >= 0"),
    ("gamma=[1]", "gamma=[1]: expected a number >= 0"),
    ("gamma=null", "gamma=null: expected a number >= 0"),
    ("gamma=nan", "gamma=nan: expected a number >= 0"),
    ("epochs=2.5", "epochs=2.5: expected an integer >= 1"),
    ("views.sizes=16", "views.sizes=16: expected a list of integers >= 4, such as [16,24,32], or null"),
    ("views.sizes=[16,2]", "views.sizes=[16,2]: expected a list of integers >= 4"),
    ("compile=maybe", "compile=maybe: expected true or false"),
    ("channels_last=1", "channels_last=1: expected true or false"),
    ("backbone.widths=8", "backbone.widths=8: expected a list"),
    ("projector=3", "projector=3: expected projector=<name>; use one of identity, linear, mlp"),
    ("dataset.name=[a]", "dataset.name=[a]: expected text"),
    # ranges
    ("V=true", "V=true: expected an integer >= 2"),
    ("V=1", "V=1: expected an integer >= 2"),
    ("epochs=0", "epochs=0: expected an integer >= 1"),
    ("batch_size=0", "batch_size=0: expected an integer >= 1"),
    ("seed=-1", "seed=-1: expected an integer from 0 to 4294967295"),
    ("gamma=-1", "gamma=-1: expected a number >= 0"),
    ("loss=simclr tau=0", "tau=0: expected a number > 0"),
    ("loss=simclr reduction=none", "reduction=none: expected one of mean, sum"),
    ("variance=soft", "variance=soft: expected one of hinge, squared"),
    ("projector.K=0", "projector.K=0: expected an integer >= 1"),
    ("projector.depth=0", "projector.depth=0: expected an integer >= 1"),
    ("optimizer.lr=0", "optimizer.lr=0: expected a number > 0"),
    ("optimizer.clip=-1", "optimizer.clip=-1: expected a number > 0 or null"),
    ("optimizer.final_lr=2", "optimizer.final_lr=2: expected a number from 0 to 1"),
    ("optimizer.warmup_epochs=20 epochs=10", "optimizer.warmup_epochs=20: expected at most epochs=10"),
    ("dataset.val=1", "dataset.val=1: expected a number > 0 and <= 0.9"),
    ("dataset.subset=0", "dataset.subset=0: expected an integer >= 1 or null"),
    ("dataset.location=disk", "dataset.location=disk: expected one of auto, device, host"),
    ("precision=fp8", "precision=fp8: expected one of auto, fp32, bf16, fp16"),
    ("device=gpu", "device=gpu: expected one of auto, cpu, cuda, cuda:<number>, mps"),
    ("views_forward=both", "views_forward=both: expected one of joint, separate"),
    (
        "probe.probes=[svm]",
        "probe.probes=[svm]: expected a non-empty list of linear, knn, ridge without repeats",
    ),
    ("probe.features=[]", "probe.features=[]: expected a non-empty list of backbone"),
    ("probe.features=[pixels]", "probe.features=[pixels]: expected a list that includes backbone"),
    ("relation=neighbors relation.k=0", "relation.k=0: expected an integer >= 1"),
    ("relation=neighbors relation.queue=-1", "relation.queue=-1: expected an integer >= 0"),
    (
        "relation.k=3",
        "relation.k is an option of relation=neighbors, not of relation=views (options: normalized)",
    ),
    ("relation=noisy relation.p=1.5", "relation.p=1.5: expected a number from 0 to 1"),
    (
        "relation=noisy relation.of=noisy",
        "relation.of=noisy: expected one of views, labels, neighbors, edges",
    ),
    ("relation=noisy relation.of=neighbors +relation.k=0", "relation.k=0: expected an integer >= 1"),
    ("-m relation=noisy relation.of=neighbors +relation.k=1,0", "relation.k=0: expected an integer >= 1"),
    (
        "solver.passes=3",
        "solver.passes is an option of solver=closed_form, not of solver=gradient (options: none)",
    ),
    ("solver=closed_form solver.ridge=-1", "solver.ridge=-1: expected a number >= 0"),
    (
        "solver=closed_form solver.name=gradient",
        "solver.name=gradient: this option cannot be set; write solver=gradient",
    ),
    (
        "backbone=linear solver.name=closed_form",
        "solver.name=closed_form: this option cannot be set; write solver=closed_form",
    ),
    (
        "solver=closed_form backbone=linear projector=mlp",
        "projector=mlp: solver=closed_form backbone=linear fits the backbone itself and has no projector",
    ),
    (
        "solver=closed_form backbone=linear projector.K=32",
        "projector.K=32: solver=closed_form backbone=linear fits the backbone itself",
    ),
    (
        "-m solver=gradient,closed_form backbone=linear projector.K=32",
        "projector.K=32: solver=closed_form backbone=linear",
    ),
    (
        "solver=closed_form backbone=linear weights=x.safetensors",
        "weights=x.safetensors: solver=closed_form backbone=linear",
    ),
    (
        "solver=closed",
        "Unknown solver 'closed'. Did you mean 'closed_form'? Available: closed_form, gradient",
    ),
    ("diagnostics.every=-1", "diagnostics.every=-1: expected an integer >= 0"),
    ("diagnostics.images=1", "diagnostics.images=1: expected an integer >= 2"),
    ("diagnostics.moments=-1", "diagnostics.moments=-1: expected an integer >= 0"),
    ("probe.every=-1", "probe.every=-1: expected an integer >= 0"),
    # grammar
    ("gamma", "expected <group>=<name> or <key>=<value>"),
    ("=3", "=3 has no key: expected <group>=<name> or <key>=<value>"),
    ("-m gamma=range(1,0)", "gamma=range(1,0) is an empty sweep"),
    (
        "probe.probes=[knn,knn]",
        "probe.probes=[knn,knn]: expected a non-empty list of linear, knn, ridge without repeats",
    ),
    ("gamma=1,2", "gamma=1,2 is a sweep: add -m"),
    ("+epochs=3", "write epochs=3"),
    ("~epochs", "epochs cannot be removed"),
    ("--config-dir nowhere", "nowhere is not a folder"),
    # resume
    ("resume=nowhere", "nowhere: expected the folder of a run"),
    ("-m resume=nowhere seed=0,1", "leave out -m"),
]


@pytest.mark.parametrize(("command", "message"), INVALID, ids=[command for command, _ in INVALID])
def test_invalid_command_line_fails_before_writing_files(
    ssl_run, tmp_path: Path, command: str, message: str
) -> None:
    code, out, err = ssl_run(command)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == []


INVALID_FOR_DATA = [
    ("batch_size=4000", "batch_size=4000: mnist5k has 3600 images to pretrain on; give at most as many"),
    ("dataset.subset=5", "expected an integer from 10 to 4000"),
    ("dataset.subset=10", "expected at least one training and one validation image per class"),
    ("dataset=folder", "dataset.root=None: expected a folder"),
    ("dataset=folder dataset.root=nowhere", "dataset.root=nowhere: expected a folder"),
    ("views.policies.all.affine.scale=[2,1]", "affine.scale=[2, 1]: expected a pair [low, high]"),
    ("+views.policies.all.flip=2", "views.policies.all.flip=2: expected a number from 0 to 1"),
    ("backbone=timm backbone.name=resnett18", "did you mean resnet18"),
    ("+optimizer.nesterof=true", "optimizer: AdamW.__init__() got an unexpected keyword argument 'nesterof'"),
    ("+dataset.sbset=5", "mnist5k() got an unexpected keyword argument 'sbset'"),
    ("device=cuda:99", "device=cuda:99: this machine has"),
    ("relation=edges", "relation.path=None: expected an existing file; give a CSV or npz"),
    ("relation=edges relation.path=pairs.csv", "relation.path=pairs.csv: expected an existing file"),
    (
        "relation=neighbors relation.k=9 relation.queue=9",
        "queue=9: expected k >= 1, and queue=0 or queue > k",
    ),
    (
        "relation=neighbors relation.k=128",
        "batch_size=128: relation=ssl_runner.relation.builders.FromNeighbors seeks neighbours within the batch",
    ),
    (
        "relation=noisy relation.of=neighbors +relation.k=128",
        "and needs 129 originals in it; give at least as many, or a smaller",
    ),
    ("relation=noisy +relation.k=3", "k=3: expected only options of labels (none)"),
    (
        "relation=noisy relation.of=neighbors +relation.queue=9",
        "queue=9: expected 0, because pairs with the queue cannot be rewired; set queue=0",
    ),
    ("relation=noisy relation.of=edges", "relation.path=None: expected an existing file; give a CSV or npz"),
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
        "weights=nowhere.safetensors: expected an existing file; give the backbone.safetensors",
    ),
    (
        "weights=.",
        "weights=.: expected a file, not a folder; give the backbone.safetensors of a finished run",
    ),
    (
        "solver=closed_form projector=mlp",
        "solver=closed_form finds one matrix on top of the backbone: use projector=linear",
    ),
    ("solver=closed_form precision=bf16", "precision=bf16: solver=closed_form computes in fp32 and fp64"),
    (
        "diagnostics.moments=3",
        "diagnostics.moments is for a linear model: use backbone=linear projector=identity",
    ),
    ("backbone.widths=[]", "backbone.widths=[]: expected a list of integers >= 1"),
    ("optimizer.betas=[2,3]", "optimizer: Invalid beta parameter"),
]


@pytest.mark.parametrize(
    ("command", "message"), INVALID_FOR_DATA, ids=[command for command, _ in INVALID_FOR_DATA]
)
def test_option_that_does_not_suit_data_fails_before_training(
    ssl_run, tmp_path: Path, command: str, message: str
) -> None:
    """Errors that only the data or the libraries reveal precede training and are stored in run.json."""
    code, out, err = ssl_run(f"device=cpu {command}")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("metrics.csv")) == []
    [record] = tmp_path.rglob("run.json")
    assert '"status": "failed"' in record.read_text()


def test_option_that_does_not_suit_data_fails_sweep_before_first_job(ssl_run, tmp_path: Path) -> None:
    """The file of pairs contains only images of the test set."""
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


def test_loss_without_linear_closed_form_fails_if_one_is_required(
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
            f"{asked}: Pull has no closed linear form; vicreg, simclr, spectral and barlow have"
        )
        assert err.count("\n") == 1
        assert list(tmp_path.rglob("run.json")) == []


def test_experiment_file_is_validated_like_command_line(ssl_run, tmp_path: Path) -> None:
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    header = "# @package _global_\ndefaults:\n  - override /loss: simclr\n"
    for name, text, message in [
        ("other", "gamma: 25", "gamma is an option of loss=vicreg, not of loss=simclr"),
        ("typo", "epoch: 3", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
        (
            "nested",
            "dataset: {sbset: 3}\nprobe: {evry: 3}",
            "Unknown option 'probe.evry'. Did you mean 'probe.every'?",
        ),
        ("type", "epochs: many", "epochs=many: expected an integer >= 1"),
        ("flat", "probe: 3", "probe=3: expected a group of options (every, probes, "),
        ("resume", "resume: somewhere", "resume=somewhere is set in a config file"),
        ("text", "epochs: '3'", "epochs='3': expected an integer >= 1"),
        ("range", "tau: -1", "tau=-1: expected a number > 0"),
        (
            "solver",
            "solver: {name: closed_form}",
            "solver.name=closed_form: this option cannot be set; write solver=closed_form",
        ),
    ]:
        (experiments / f"{name}.yaml").write_text(header + text + "\n")
        code, out, err = ssl_run(f"--config-dir mine experiment={name}")
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


def test_top_level_gamma_sets_gamma_of_vicreg(ssl_run) -> None:
    code, out, _ = ssl_run("loss=vicreg gamma=7 --cfg job --resolve")
    assert code == 0
    assert "gamma: 7\n  variance: hinge\nbackbone" in out


def test_cfg_and_help_do_not_import_torch() -> None:
    """Importing torch would take most of the one second allowed for `--cfg job` and `--help`."""
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
