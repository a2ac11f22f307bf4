"""Error messages of `ssl-run` for invalid input: one line on stderr, exit code 1, no files written."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import ssl_runner
from ssl_runner import cli
from ssl_runner.config import arguments, grid
from ssl_runner.config.compose import CONF
from ssl_runner.config.help import read_comments
from ssl_runner.config.rules import dotted_keys, format_value
from ssl_runner.data.readers import mnist5k
from ssl_runner.errors import UsageError

LOSS_NAMES = ", ".join(sorted(path.stem for path in (CONF / "loss").glob("*.yaml")))
INVALID = [
    ("optimizer.betas=[2,3]", "optimizer.betas=[2,3]: expected two numbers from 0 to 1"),
    ("hydra.run.dir=d${x}", "hydra.run.dir: Interpolation key 'x' not found; correct it, or write \\${ for"),
    ("V=99999999999", "V=99999999999: expected an integer from 2 to 10000"),
    ("forward=per_view batch_size=1", "batch_size=1: expected 2 or more"),
    # options of another loss
    (
        "loss=simclr gamma=25",
        "gamma is an option of loss=frossl, loss=sigreg and loss=vicreg, not of loss=simclr"
        " (options: tau, reduction, denominator)",
    ),
    ("loss=simclr +gamma=25", "gamma is an option of loss=frossl, loss=sigreg and loss=vicreg, not of"),
    (
        "loss=vicreg tau=0.5",
        "tau is an option of loss=simclr, not of loss=vicreg (options: alpha, beta, gamma, variance)",
    ),
    (
        "loss=simclr alpha=1",
        "alpha is an option of loss=barlow, loss=mmcr, loss=sigreg and loss=vicreg, not of",
    ),
    (
        "-m loss=vicreg,simclr gamma=1,25",
        "gamma is an option of loss=frossl, loss=sigreg and loss=vicreg, not of loss=simclr",
    ),
    ("loss=sigreg directions=0", "directions=0: expected an integer >= 1"),
    # unknown keys and choices
    ("epoch=3", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
    ("-m epoch=3,4", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
    ("lr=0.1", "Unknown option 'lr'. Did you mean 'optimizer.lr'?"),
    ("projector.k=8", "Did you mean 'projector.K'?"),
    ("los=simclr", "Did you mean 'loss'?"),
    (
        "loss=simclrr",
        f"Unknown loss 'simclrr'. Did you mean 'simclr'? Available: {LOSS_NAMES}",
    ),
    ("optimizer=adam", "Unknown optimizer 'adam'. Did you mean 'adamw'? Available: adamw, lars, sgd"),
    ("experiment=nope", "Unknown experiment 'nope'. Available: "),
    ("+something=1", "Unknown option 'something'. List all: ssl-run --cfg job"),
    ("something=[1,2]", "Unknown option 'something'. List all: ssl-run --cfg job"),
    (
        "dataset=folder backbone=linear backbone.widths=[8,16]",
        "backbone.widths is an option of backbone=convnet",
    ),
    ("++something=1", "Unknown option 'something'. List all: ssl-run --cfg job"),
    (
        "dataset.root=/x",
        "dataset.root is an option of dataset=cifar10, dataset=cifar100, dataset=folder,",
    ),
    ("views.policies.all.flip=0.5", "Add it as a new argument: +views.policies.all.flip=0.5"),
    ("loss.gamma=3", "loss.gamma=3: options of a loss are set at the top level; write gamma=3"),
    ("~loss", f"~loss=null: expected loss=<name>; use one of {LOSS_NAMES}"),
    (
        "loss=null",
        f"loss=null: expected loss=<name>; use one of {LOSS_NAMES}",
    ),
    (
        "'loss=[vicreg,simclr]'",
        f"expected loss=<name>; use one of {LOSS_NAMES}",
    ),
    ("--foo", "--foo: expected an option of ssl-run; list the options"),
    # types
    ("gamma=abc", "gamma=abc: expected a number >= 0"),
    ("-m gamma=1,abc", "gamma=abc: expected a number >= 0"),
    ("gamma=[1]", "gamma=[1]: expected a number >= 0"),
    ("gamma=null", "gamma=null: expected a number >= 0"),
    ("gamma=nan", "gamma=nan: expected a number >= 0"),
    ("epochs=2.5", "epochs=2.5: expected an integer >= 1"),
    (
        "views.resolutions=16",
        "views.resolutions=16: expected a list of integers >= 4, such as [16,24,32], or null",
    ),
    ("views.resolutions=[16,2]", "views.resolutions=[16,2]: expected a list of integers >= 4"),
    ("views=multicrop V=4", "V=4: expected 8, the sum of count over views.policies; set V=8"),
    ("+views.policies.all.count=3", "V=2: expected 3, the sum of count over views.policies; set V=3"),
    ("views=multicrop views.policies.small.count=0", "small.count=0: expected an integer >= 1 or null"),
    ("views=multicrop views.policies.small.size=3", "small.size=3: expected an integer >= 4 or null"),
    ("+views.policies.all.size=small", "views.policies.all.size=small: expected an integer >= 4 or null"),
    (
        "views=barlow +views.policies.first.count=2",
        "views.policies.second.count=null: expected an integer >= 1, since another policy has a count",
    ),
    (
        "views=multicrop views.resolutions=[16,28]",
        "views.policies.small.size=16: expected null with views.resolutions; leave one of the two out",
    ),
    (
        "views=multicrop backbone=linear",
        "views.policies.small.size=16: expected null with backbone=linear, which accepts one size; leave it",
    ),
    ("compile=maybe", "compile=maybe: expected one of auto, graphs, true, false"),
    ("channels_last=1", "channels_last=1: expected true or false"),
    ("backbone.widths=8", "backbone.widths=8: expected a list"),
    ("projector=3", "projector=3: expected projector=<name>; use one of identity, linear, mlp"),
    ("dataset.name=[a]", "dataset.name=[a]: expected text"),
    # ranges
    ("V=true", "V=true: expected an integer from 2 to 10000"),
    ("V=1", "V=1: expected an integer from 2 to 10000"),
    ("epochs=0", "epochs=0: expected an integer >= 1"),
    ("batch_size=0", "batch_size=0: expected an integer >= 1"),
    ("seed=-1", "seed=-1: expected an integer from 0 to 4294967295"),
    ("gamma=-1", "gamma=-1: expected a number >= 0"),
    ("loss=simclr tau=0", "tau=0: expected a number > 0"),
    ("loss=simclr reduction=none", "reduction=none: expected one of mean, sum"),
    ("loss=simclr denominator=some", "denominator=some: expected one of all, negatives"),
    ("loss=frossl per_view=2", "per_view=2: expected true or false"),
    ("variance=soft", "variance=soft: expected one of hinge, squared"),
    ("projector.K=0", "projector.K=0: expected an integer >= 1"),
    ("projector.depth=0", "projector.depth=0: expected an integer >= 1"),
    ("optimizer.lr=0", "optimizer.lr=0: expected a number > 0"),
    ("optimizer.clip_grad_norm=-1", "optimizer.clip_grad_norm=-1: expected a number > 0 or null"),
    ("optimizer.final_lr_ratio=2", "optimizer.final_lr_ratio=2: expected a number from 0 to 1"),
    ("optimizer.warmup_epochs=20 epochs=10", "optimizer.warmup_epochs=20: expected at most epochs=10"),
    ("dataset.val_fraction=1", "dataset.val_fraction=1: expected a number > 0 and <= 0.9"),
    ("dataset.subset=0", "dataset.subset=0: expected an integer >= 1 or null"),
    ("dataset.storage=disk", "dataset.storage=disk: expected one of auto, device, host"),
    ("precision=fp8", "precision=fp8: expected one of auto, fp32, tf32, bf16, fp16"),
    ("dataset.size=2", "dataset.size=2: expected an integer >= 4 or null"),
    ("dataset=folder dataset.cache=null", "dataset.cache=null: expected text"),
    ("dataset.channels=2", "dataset.channels=2: expected one of 1, 3 or null"),
    (
        "backbone=resnet18 backbone.stem=tiny",
        "backbone.stem=tiny: expected one of auto, cifar, pool, imagenet",
    ),
    ("optimizer=lars optimizer.trust_clip=1", "optimizer.trust_clip=1: expected true or false"),
    ("optimizer=lars optimizer.trust_coeff=0", "optimizer.trust_coeff=0: expected a number > 0"),
    ("device=gpu", "device=gpu: expected one of auto, cpu, cuda, cuda:<number>, mps"),
    ("forward=both", "forward=both: expected one of joint, per_view"),
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
        "relation.k is an option of relation=neighbors and relation=walks, not of relation=views",
    ),
    (
        "relation=noisy relation.rewire_fraction=2",
        "relation.rewire_fraction=2: expected a number from 0 to 1",
    ),
    # a nested relation
    (
        "relation@relation.base=labels",
        "relation@relation.base=labels: relation=views has no 'base'; it belongs to relation=noisy",
    ),
    (
        "relation.base.k=3",
        "Unknown option 'relation.base.k': relation=views has no 'base'; it belongs to relation=noisy",
    ),
    (
        "relation=noisy relation@relation.base=neighbours",
        "Unknown relation 'neighbours'. Did you mean 'neighbors'? Available: edges, labels, neighbors, noisy",
    ),
    (
        "relation=noisy relation@relation.base=null",
        "expected relation@relation.base=<name>; use one of edges, labels, neighbors, noisy, views",
    ),
    (
        "relation=noisy relation.base.k=3",
        "relation.base.k is an option of relation@relation.base=neighbors and relation@relation.base=walks,",
    ),
    (
        "relation=noisy relation@relation.base=neighbors relation.base.k=0",
        "relation.base.k=0: expected an integer >= 1",
    ),
    (
        "-m relation=noisy relation@relation.base=neighbors relation.base.k=1,0",
        "relation.base.k=0: expected an integer >= 1",
    ),
    ("-m relation=noisy relation@relation.base=views,edge", "Unknown relation 'edge'. Did you mean 'edges'?"),
    (
        "solver.passes=3",
        "solver.passes is an option of solver=closed_form, not of solver=gradient (options: none)",
    ),
    ("solver=closed_form solver.ridge=-1", "solver.ridge=-1: expected a number >= 0"),
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
        "solver=closed_form backbone=linear init_weights=x.safetensors",
        "init_weights=x.safetensors: solver=closed_form backbone=linear",
    ),
    (
        "solver=closed",
        "Unknown solver 'closed'. Did you mean 'closed_form'? Available: closed_form, gradient",
    ),
    ("diagnostics.every=-1", "diagnostics.every=-1: expected an integer >= 0"),
    ("diagnostics.num_images=1", "diagnostics.num_images=1: expected an integer >= 2"),
    ("probe.every=-1", "probe.every=-1: expected an integer >= 0"),
    ("tags=[]", "tags=[]: expected text or an integer or a list of these or null"),
    ("tags={a:1}", "expected text or an integer or a list of these or null"),
    ("note=[a]", "note=[a]: expected text or an integer or null"),
    # launchers and sweepers
    (
        "-m hydra/launcher=submitit_local V=2,3",
        "hydra/launcher=submitit_local: expected a preset of ssl_runner; use",
    ),
    ("-m hydra/launcher=submitit_slurm V=2,3", "of ssl_runner; use hydra/launcher=slurm"),
    (
        "-m hydra/launcher=slurn V=2,3",
        "Unknown hydra/launcher 'slurn'. Did you mean 'slurm'? Available: basic, joblib",
    ),
    (
        "-m hydra/launcher=joblib hydra.launcher.n_jobs=0 V=2,3",
        "hydra.launcher.n_jobs=0: expected a number of jobs",
    ),
    ("-m hydra/launcher=slurm hydra.launcher.timeout_min=0 V=2,3", "timeout_min=0: expected an integer >= 1"),
    ("hydra/launcher=slurm", "hydra/launcher=slurm: expected a sweep; add -m, or leave it out"),
    ("hydra/sweeper=optuna", "hydra/sweeper=optuna: expected a sweep; add -m, or leave it out"),
    (
        "-m gamma=interval(1,2)",
        "gamma=interval(1,2): expected values, which a grid enumerates; list them, or add",
    ),
    ("-m hydra/sweeper=optuna", "hydra/sweeper=optuna: expected an option to search over; add one, such as"),
    ("-m hydra/sweeper=optuna gamma=5", "hydra/sweeper=optuna: expected an option to search over"),
    ("-m hydra/sweeper=optuna hydra.sweeper.n_trials=0 V=2,3", "n_trials=0: expected an integer >= 1"),
    (
        "-m hydra/sweeper=optuna hydra.sweeper.n_jobs=0 V=2,3",
        "hydra.sweeper.n_jobs=0: expected an integer >= 1",
    ),
    ("-m hydra/sweeper=optuna hydra.sweeper.direction=up V=2,3", "expected one of maximize, minimize"),
    ("-m hydra/sweeper=optuna hydra.sweeper.max_failure_rate=2 V=2,3", "expected a number from 0 to 1"),
    (
        "-m experiment=rank_vs_gamma,supervised_digits",
        "experiment=rank_vs_gamma: has a grid of its own, which has no effect on a sweep over files; start",
    ),
    ("proj_hidden_dim=64", "Unknown option 'proj_hidden_dim'. Did you mean 'projector.width'?"),
    ("loss=simclr sim_loss_weight=25", "Did you mean 'gamma' of loss="),
    ("data_dir=images", "Did you mean 'dataset.root' of dataset=cifar10, dataset=cifar100,"),
    ("output_dir=a", "Did you mean 'hydra.run.dir'?"),
    ("num_workers=4", "Unknown option 'num_workers': the images are in memory"),
    ("debug=slow", "Unknown debug 'slow'. Available: fast, profile"),
    ("profile=1", "profile=1: expected true or false"),
    # grammar
    ("gamma", "expected <group>=<name> or <key>=<value>"),
    ("=3", "=3 has no key: expected <group>=<name> or <key>=<value>"),
    ("-m gamma=range(1,0)", "gamma=range(1,0): expected one or more values to sweep over"),
    (
        "probe.probes=[knn,knn]",
        "probe.probes=[knn,knn]: expected a non-empty list of linear, knn, ridge without repeats",
    ),
    ("gamma=1,2", "gamma=1,2 is a sweep: add -m"),
    ("+epochs=3", "write epochs=3"),
    ("~epochs", "epochs cannot be removed"),
    ("hydra.output_subdir=.hydra", "hydra.output_subdir=.hydra: expected null, because a run writes .hydra/"),
    ("--config-dir nowhere", "--config-dir=nowhere: expected a folder"),
    ("--config-path nowhere", "nowhere: expected a folder that contains <group>/<name>.yaml"),
    # entries of open maps
    ("evaluators.norm._target_=pkg.Norm", "Add it as a new argument: +evaluators.norm._target_=pkg.Norm"),
    ("+evaluators.norm.every=1", "expected a _target_; add +evaluators.norm._target_=<module>.<class>"),
    ("+evaluators.norm=1", "evaluators.norm=1: expected a _target_"),
    ("+evaluator.norm._target_=pkg.Norm", "Unknown option 'evaluator.norm._target_'"),
    ("+probe.classifier.mlp._target_=pkg.Mlp", "Unknown option 'probe.classifier.mlp._target_'"),
    (
        "+probe.classifiers.mlp._target_=pkg.Mlp probe.probes=[mpl]",
        "probe.probes=[mpl]: expected a non-empty list of linear, knn, ridge, mlp without repeats",
    ),
    # loggers
    ("logger=tensorbord", "Unknown logger 'tensorbord'. Did you mean 'tensorboard'?"),
    (
        "logger.project=mine",
        "logger.project is an option of logger=trackio and logger=wandb, not of logger=none",
    ),
    ("logger=wandb logger.mode=of", "logger.mode=of: expected one of online, offline or null"),
    # names of other libraries
    ("temperature=0.1", "Unknown option 'temperature'. Did you mean 'tau' of loss=simclr?"),
    ("loss=simclr temperature=0.1", "Unknown option 'temperature'. Did you mean 'tau'?"),
    ("learning_rate=0.1", "Unknown option 'learning_rate'. Did you mean 'optimizer.lr'?"),
    ("optimizer.learning_rate=0.1", "Did you mean 'optimizer.lr'?"),
    # resume
    ("dataset=folder dataset.test=0.1", "a share of the images is dataset.test_fraction=0.1; use it"),
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
    (
        "batch_size=4000",
        "batch_size=4000: expected at most 3600, the pretraining images of mnist5k; use a smaller",
    ),
    ("dataset.subset=5", "expected an integer from 10 to 4000"),
    ("dataset.subset=10", "none can be held out: each class has one; use dataset.subset=13"),
    ("dataset.subset=12", "in 10 classes none would be held out; use dataset.val_fraction=0.25"),
    (
        "+probe.classifiers.knn.foo=1",
        "probe.classifiers.knn.foo: expected an option of the chosen probe.classifiers.knn; leave it out",
    ),
    ("dataset=folder", "dataset.root=null: expected a folder"),
    ("dataset=folder dataset.root=nowhere", "dataset.root=nowhere: expected a folder"),
    ("views.policies.all.affine.scale=[2,1]", "affine.scale=[2, 1]: expected a pair [low, high]"),
    ("+views.policies.all.flip=2", "views.policies.all.flip=2: expected a number from 0 to 1"),
    ("backbone=timm backbone.name=resnett18", "did you mean resnet18"),
    (
        "backbone=timm backbone.name=resnet10t +backbone.num_classes=5",
        "backbone.num_classes=5: expected no such",
    ),
    (
        "backbone=timm backbone.name=resnet10t +backbone.foo=5",
        "backbone.foo: expected an option of the chosen",
    ),
    ("+optimizer.nesterof=true", "optimizer.nesterof: expected an option of the chosen optimizer"),
    ("+dataset.sbset=5", "dataset.sbset: expected an option of the chosen dataset"),
    ("device=cuda:99", "device=cuda:99: this machine has"),
    ("relation=edges", "relation.path=None: expected an existing file; give a CSV or npz"),
    ("relation=edges relation.path=pairs.csv", "relation.path=pairs.csv: expected an existing file"),
    (
        "relation=neighbors relation.k=9 relation.queue=9",
        "queue=9: expected k >= 1, and queue=0 or queue > k",
    ),
    (
        "relation=neighbors relation.k=128",
        "batch_size=128: expected at least 129, because this relation finds neighbours within the batch",
    ),
    (
        "relation=noisy relation@relation.base=neighbors relation.base.k=128",
        "expected at least 129, because this relation finds neighbours within the batch",
    ),
    ("relation=noisy +relation.k=3", "relation.k: expected an option of the chosen relation; leave it out"),
    ("relation=noisy +relation.base.k=3", "relation.base.k: expected an option of the chosen relation.base"),
    (
        "relation=noisy relation@relation.base=neighbors relation.base.queue=9",
        "expected a relation without a queue, whose support rows cannot be rewired; set base.queue=0",
    ),
    (
        "relation=noisy relation@relation.base=edges",
        "relation.path=None: expected an existing file; give a CSV or npz",
    ),
    (
        "solver=closed_form relation=neighbors relation.queue=9",
        "solver=closed_form needs positive pairs within one batch; set relation.queue=0",
    ),
    (
        "init_weights=nowhere.safetensors",
        "init_weights=nowhere.safetensors: expected an existing file; give the backbone.safetensors",
    ),
    (
        "init_weights=.",
        "init_weights=.: expected a file, not a folder; give the backbone.safetensors of a finished run",
    ),
    (
        "solver=closed_form projector=mlp",
        "solver=closed_form solves for one linear layer on the backbone; use projector=linear",
    ),
    ("solver=closed_form precision=bf16", "precision=bf16: ClosedForm computes in fp32 and fp64"),
    ("backbone.widths=[]", "backbone.widths=[]: expected a list of integers >= 1"),
    ("optimizer.momentum=-1 optimizer=sgd", "optimizer: Invalid momentum value"),
]


@pytest.mark.parametrize(
    ("command", "message"), INVALID_FOR_DATA, ids=[command for command, _ in INVALID_FOR_DATA]
)
def test_option_that_does_not_suit_data_fails_before_training(
    ssl_run, tmp_path: Path, command: str, message: str
) -> None:
    """Errors that only the data or the libraries reveal precede training and leave no folder."""
    code, out, err = ssl_run(f"device=cpu {command}")
    assert (code, out) == (1, "")
    assert message in err
    assert not re.match(r"(\w+): \1\.", err)  # the option is named once
    assert err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_option_that_does_not_suit_data_fails_sweep_before_first_job(ssl_run, tmp_path: Path) -> None:
    """The file of pairs contains only images of the test set."""
    (tmp_path / "pairs.csv").write_text(
        "i,j\n" + "\n".join(f"{i},{j}" for i, j in pairwise(mnist5k().test[:100]))
    )
    for command, message in (
        (
            "relation=edges relation.path=pairs.csv,pairs.csv",
            "pairs.csv: expected pairs of the 3600 pretraining images, found none",
        ),
        (
            "relation=noisy relation@relation.base=edges relation.base.path=pairs.csv seed=0,1",
            "expected pairs of the 3600 pretraining images, found none",
        ),
        ("relation=neighbors relation.k=1,200", "expected at least 201, because this relation"),
        (
            "solver=closed_form relation=neighbors relation.queue=0,9",
            "needs positive pairs within one batch; set relation.queue=0",
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
    code, out, err = ssl_run(
        "--config-dir mine -m loss=vicreg,pull backbone=linear solver=closed_form device=cpu"
    )
    assert (code, out) == (1, "")
    assert "solver=closed_form: Pull has no closed form for a linear model" in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("run.json")) == []


def test_experiment_file_is_validated_like_command_line(ssl_run, tmp_path: Path) -> None:
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    header = "# @package _global_\ndefaults:\n  - override /loss: simclr\n"
    for name, text, message in [
        (
            "other",
            "gamma: 25",
            "gamma is an option of loss=frossl, loss=sigreg and loss=vicreg, not of loss=simclr",
        ),
        ("typo", "epoch: 3", "Unknown option 'epoch'. Did you mean 'epochs'? List all: ssl-run --cfg job"),
        (
            "nested",
            "dataset: {sbset: 3}\nprobe: {evry: 3}",
            "Unknown option 'probe.evry'. Did you mean 'probe.every'?",
        ),
        ("type", "epochs: many", "epochs=many: expected an integer >= 1"),
        ("flat", "probe: 3", "probe=3: expected a group of options (every, keep, probes, "),
        ("resume", "resume: somewhere", "resume=somewhere is set in a config file"),
        ("text", "epochs: '3'", "epochs='3': expected an integer >= 1"),
        ("range", "tau: -1", "tau=-1: expected a number > 0"),
        ("solver", "solver: {name: closed_form}", "solver.name was renamed: use solver=closed_form"),
        (
            "renamed",
            "optimizer: {final_lr: 0.1}",
            "optimizer.final_lr was renamed: use optimizer.final_lr_ratio=0.1",
        ),
        ("root", "views_forward: separate", "views_forward was renamed: use forward=per_view"),
        ("entry", "evaluators: {norm: {every: 1}}", "evaluators.norm={'every': 1}: expected a _target_"),
    ]:
        (experiments / f"{name}.yaml").write_text(header + text + "\n")
        code, out, err = ssl_run(f"--config-dir mine experiment={name}")
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "views=bare: expected a value of views.policies; add it to its file\n"),
        ("policies: null", "views.policies=null: expected <name>: <options of the policy>, once or more\n"),
    ],
)
def test_missing_option_of_a_users_config_is_named(ssl_run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine" / "views").mkdir(parents=True)
    (tmp_path / "mine" / "views" / "bare.yaml").write_text(f"_target_: ssl_runner.views.Augment\n{text}\n")
    code, out, err = ssl_run("--config-dir mine views=bare --cfg job")
    assert (code, out) == (1, "")
    assert err.startswith(message)


def test_top_level_gamma_sets_gamma_of_vicreg(ssl_run) -> None:
    code, out, _ = ssl_run("loss=vicreg gamma=7 --cfg job --resolve")
    assert code == 0
    assert "gamma: 7\n  variance: hinge\nbackbone" in out


# --- former names -------------------------------------------------------------------------------------------

FORMER = [
    ("optimizer.final_lr=0.1", "optimizer.final_lr was renamed: use optimizer.final_lr_ratio=0.1"),
    ("+optimizer.final_lr=0.1", "optimizer.final_lr was renamed: use optimizer.final_lr_ratio=0.1"),
    ("-m optimizer.clip=1,2", "optimizer.clip was renamed: use optimizer.clip_grad_norm=1"),
    ("dataset.val=0.2", "dataset.val was renamed: use dataset.val_fraction=0.2"),
    ("dataset.location=host", "dataset.location was renamed: use dataset.storage=host"),
    ("weights=a.safetensors", "weights was renamed: use init_weights=a.safetensors"),
    ("views.sizes=[16,28]", "views.sizes was renamed: use views.resolutions=[16,28]"),
    ("views_forward=joint", "views_forward was renamed: use forward=joint"),
    ("views_forward=separate", "views_forward was renamed: use forward=per_view"),
    ("diagnostics.images=40", "diagnostics.images was renamed: use diagnostics.num_images=40"),
    ("diagnostics.moments=3", "diagnostics.moments was removed: use evaluators.moments"),
    ("relation=noisy relation.of=neighbors", "relation.of was renamed: use relation@relation.base=neighbors"),
    ("relation=noisy relation.p=0.3", "relation.p was renamed: use relation.rewire_fraction=0.3"),
    ("solver.name=closed_form", "solver.name was renamed: use solver=closed_form"),
    ("loss=simclr_squared", "loss=simclr_squared was renamed: use loss=spectral"),
    ("-m loss=vicreg,simclr_squared", "loss=simclr_squared was renamed: use loss=spectral"),
]


@pytest.mark.parametrize(("command", "message"), FORMER, ids=[command for command, _ in FORMER])
def test_former_name_is_refused_and_the_suggested_one_is_accepted(
    ssl_run, command: str, message: str
) -> None:
    code, out, err = ssl_run(command)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    if "renamed" in message:
        group = "relation=noisy" if "relation" in command else ""
        assert ssl_run(f"{group} {message.partition(': use ')[2]} --cfg job")[0] == 0


def test_former_choice_in_experiment_file_is_refused(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "old.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /loss: simclr_squared\n"
    )
    assert ssl_run("--config-dir mine experiment=old") == (
        1,
        "",
        "loss=simclr_squared was renamed: use loss=spectral\n",
    )


def test_former_name_is_accepted_where_a_config_defines_it(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "relation").mkdir(parents=True)
    (tmp_path / "mine" / "relation" / "own.yaml").write_text("_target_: own.Random\np: 0.5\n")
    code, out, err = ssl_run("--config-dir mine relation=own relation.p=0.3 --cfg job --package relation")
    assert (code, err) == (0, "")
    assert "p: 0.3" in out


# --- additions ----------------------------------------------------------------------------------------------


def test_entries_of_open_maps_are_accepted_from_command_line_and_experiment(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\n"
        "evaluators: {norm: {_target_: pkg.Norm, every: 3}}\n"
        "probe: {probes: [mlp], classifiers: {mlp: {_target_: pkg.Mlp, depth: 2}}}\n"
    )
    for command in (
        "+evaluators.norm._target_=pkg.Norm +evaluators.norm.every=3 +probe.classifiers.mlp._target_=pkg.Mlp"
        " +probe.classifiers.mlp.depth=2 probe.probes=[mlp]",
        "'+evaluators.norm={_target_: pkg.Norm, every: 3}' probe.probes=[mlp]"
        " '+probe.classifiers.mlp={_target_: pkg.Mlp, depth: 2}'",
        "--config-dir mine experiment=own",
    ):
        code, out, err = ssl_run(f"{command} --cfg job")
        assert (code, err) == (0, "")
        config = OmegaConf.create(out)
        assert config.evaluators == {"norm": {"_target_": "pkg.Norm", "every": 3}}
        assert list(config.probe.classifiers) == ["linear", "knn", "ridge", "mlp"]
        assert config.probe.classifiers.mlp == {"_target_": "pkg.Mlp", "depth": 2}


def test_nested_relation_is_composed(ssl_run) -> None:
    command = "relation=noisy relation@relation.base=neighbors relation.base.k=2 --cfg job --package relation"
    code, out, err = ssl_run(command)
    assert (code, err) == (0, "")
    assert OmegaConf.create(out).base.k == 2


def test_experiment_is_accepted_with_plus(ssl_run) -> None:
    plain, added = (ssl_run(f"{sign}experiment=supervised_digits --cfg job") for sign in ("", "+"))
    assert plain == added
    assert plain[0] == 0


def test_cfg_lists_jobs_of_sweep(ssl_run, tmp_path: Path) -> None:
    code, out, err = ssl_run("-m --cfg job loss=vicreg,simclr seed=range(0,2) hydra.sweep.dir=swept")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "#0 loss=vicreg seed=0",
        "#1 loss=vicreg seed=1",
        "#2 loss=simclr seed=0",
        "#3 loss=simclr seed=1",
        "4 jobs",
    ]
    assert list(tmp_path.rglob("*")) == []


def test_missing_plugin_names_the_extra_to_install(ssl_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """find_spec raises if the package `hydra_plugins` is missing as well, without any extra."""

    def missing(module: str) -> None:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr("ssl_runner.config.sweeps.find_spec", missing)
    for choice, extra in (
        ("launcher=joblib", "sweep"),
        ("launcher=slurm", "slurm"),
        ("sweeper=optuna", "sweep"),
    ):
        code, out, err = ssl_run(f"-m hydra/{choice} gamma=1,5")
        assert (code, out) == (1, "")
        assert re.fullmatch(rf"hydra/{choice}: expected .* run pip install 'ssl_runner\[{extra}\]'\n", err)


def test_names_of_jobs_hold_only_swept_overrides(ssl_run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "-m epochs=1 gamma=choice(1,5) 'optimizer.clip_grad_norm=choice(null,1.0)' relation=labels"
    for choice in ("basic", "optuna"):
        listed = ssl_run(f"{command} hydra/sweeper={choice} --cfg job")[1].splitlines()
        assert listed[:2] == [
            f"#{i} gamma=1 optimizer.clip_grad_norm={v}" for i, v in enumerate(("null", "1.0"))
        ]
    args = arguments.parse(arguments.parser(), shlex.split(command))
    cli.prepare(args, processes=1)
    assert args.overrides[-1] == "hydra.job.config.override_dirname.exclude_keys=[epochs,relation]"
    args = arguments.parse(arguments.parser(), ["experiment=views_time", "loss=simclr", "seed=0"])
    cli.prepare(args, processes=1)
    assert args.overrides[-1] == "hydra.job.config.override_dirname.exclude_keys=[experiment,loss,seed]"


def test_search_file_starts_a_search_without_m(ssl_run, tmp_path: Path) -> None:
    out = ssl_run("hparams_search=optuna 'projector.K=choice(8,16)' debug=fast --cfg job")[1].splitlines()
    assert out == ["#0 projector.K=8", "#1 projector.K=16", "2 jobs"]
    sweeper = OmegaConf.create(ssl_run("hparams_search=optuna --cfg hydra -p hydra.sweeper")[1])
    assert sweeper._target_.endswith("OptunaSweeper")
    assert sweeper.n_trials == 20


def test_local_file_sets_defaults_of_runs_and_of_slurm(ssl_run, tmp_path: Path, monkeypatch) -> None:
    assert "\npartition: null" in ssl_run("hydra/launcher=slurm --cfg hydra -p hydra.launcher --resolve")[1]
    (tmp_path / "mine" / "local").mkdir(parents=True)
    (tmp_path / "mine" / "local" / "default.yaml").write_text(
        "# @package _global_\nprecision: fp32\nseed: 3\nhydra:\n  env: {partition: gpu, account: lab}\n"
        "  job: {env_set: {SSL_RUNNER_DATA: /scratch}}\n"
    )
    code, out, err = ssl_run("--config-dir mine seed=4 --cfg job")
    assert (code, err) == (0, "")
    assert OmegaConf.create(out).precision == "fp32"
    assert OmegaConf.create(out).seed == 4
    slurm = "--config-dir mine hydra/launcher=slurm --cfg hydra -p hydra.launcher --resolve"
    launcher = OmegaConf.create(ssl_run(slurm)[1])
    assert (launcher.partition, launcher.account) == ("gpu", "lab")
    args = arguments.parse(arguments.parser(), ["--config-dir", "mine"])
    assert grid.sweep_settings(args) == ({"SSL_RUNNER_DATA": "/scratch"}, False)
    (tmp_path / "mine" / "local" / "default.yaml").write_text("# @package _global_\nepoch: 3\n")
    assert ssl_run("--config-dir mine local=typo")[2].startswith("Unknown local 'typo'.")
    refused = ssl_run("--config-dir mine local=null")[2]
    assert refused == "local=null: expected local=<name>; use one of default\n"
    assert "Unknown option 'epoch'. Did you mean 'epochs'?" in ssl_run("--config-dir mine --cfg job")[2]


def test_sweep_of_experiment_file_is_listed_and_validated(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    for name, values in (("good", "1,5"), ("bad", "1,-5")):
        (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_text(
            f"# @package _global_\nhydra: {{sweeper: {{params: {{gamma: '{values}'}}}}}}\n"
        )
    code, out, _ = ssl_run("--config-dir mine -m experiment=good --cfg job")
    assert (code, out) == (0, "#0 gamma=1\n#1 gamma=5\n2 jobs\n")
    code, out, err = ssl_run("--config-dir mine -m experiment=bad")
    assert (code, out, err) == (1, "", "gamma=-5: expected a number >= 0 (from hydra.sweeper.params)\n")
    assert ssl_run("--config-dir mine experiment=good gamma=3,4 --cfg job")[1].endswith("2 jobs\n")
    assert ssl_run("--config-dir mine experiment=bad") == (code, out, err)  # without -m
    assert ssl_run("--config-dir mine experiment=bad gamma=3 --cfg job")[1].startswith("V: 2\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    with pytest.raises(UsageError, match=r"expected a single run, .* \(2 jobs, .* gamma=1"):
        ssl_runner.run("experiment=good", config_dir="mine")
    with pytest.raises(UsageError, match="expected a single run, but the experiment sweeps"):
        ssl_runner.run("hparams_search=optuna", "projector.K=8", "optimizer.weight_decay=0.1")


# --- help and version ---------------------------------------------------------------------------------------


def test_help_describes_every_choice_and_option(ssl_run, tmp_path: Path) -> None:
    """Expected names come from the file tree and from `--cfg job`."""
    code, out, err = ssl_run("--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 110
    groups, options = out.split("\nOptions and their values\n")
    described = re.findall(r"^  [* ] (\w+) +\S", groups, flags=re.M)
    files = [*CONF.glob("*/*.yaml"), *CONF.glob("hydra/*/*.yaml")]
    assert sorted(described) == sorted(file.stem for file in files)
    assert sorted(re.findall(r"^  \* (\w+)", groups, flags=re.M)) == sorted(
        ["digits", "views", "vicreg", "convnet", "mlp", "gradient", "adamw", "default", "mnist5k", "none"]
    )
    defaults = dict(re.findall(r"^([\w.]+)=(\S+)(?=\s+[^\s=\[]+ )", options, flags=re.M))
    config = OmegaConf.create(ssl_run("--cfg job")[1])
    expected = {
        key: format_value(OmegaConf.select(config, key))
        for key in dotted_keys(config)
        if not key.endswith("_target_") and not key.startswith(("loss.", "views.policies."))
    }
    classifiers = {"evaluators": "{}", "probe.classifiers": "{linear,knn,ridge}"}
    assert defaults == expected | classifiers
    assert "epochs=10 passes over the training images [an integer >= 1]" in flat(options)
    assert "channels_last=true memory format of images and convolutions [true or false]" in flat(options)


def test_formatted_value_is_read_by_hydra_as_the_same_value() -> None:
    value = {"a": 1, "b": [1.5, "true", None, "x"], "c": {"d": False}}
    parsed = OverridesParser.create().parse_override(f"key={format_value(value)}")
    assert parsed.value() == value


def test_help_shows_options_of_chosen_configs(ssl_run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "pull.yaml").write_text(
        "# @package _global_\n# Pulls positives together. Nothing else.\n"
        "strength: 2.0   # weight, > 0\nloss: {_target_: own.Pull, strength: '${strength}'}\n"
    )
    code, out, err = ssl_run("--config-dir mine loss=pull relation=noisy --help")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "* pull Pulls positives together." in lines
    assert "strength=2.0 weight, > 0 [a number]" in lines
    assert "relation.base.normalized=false" in out
    assert "relation@relation.base=\n  * labels" in out
    assert "\ngamma=" not in out
    assert ssl_run("loss=pull --help")[0] == 1


def flat(text: str) -> str:
    """The text on one line, without alignment."""
    return " ".join(text.split())


def test_help_of_a_choice_shows_its_part_of_the_page_of_options(ssl_run) -> None:
    code, out, err = ssl_run("--help loss=simclr")
    assert (code, err) == (0, "")
    page = (CONF.parent / "docs" / "options.md").read_text("utf-8")
    rows = page.partition("`loss=simclr`")[2].partition("`loss=spectral`")[0].splitlines()[4:-1]
    cells = [[cell.strip("` ") for cell in row.strip("|").split(" | ")] for row in rows]
    expected = [f"{name}={value} {meaning} [{accepted}]" for name, value, accepted, meaning in cells]
    assert flat(out).endswith(" ".join(expected))
    assert len(expected) == 3
    assert re.findall(r"^  ([* ] \w+)", out, flags=re.M) == [
        f"{'*' if path.stem == 'simclr' else ' '} {path.stem}" for path in sorted(CONF.glob("loss/*.yaml"))
    ]
    assert "backbone" not in out


@pytest.mark.parametrize(
    ("command", "parts", "absent"),
    [
        (
            "views",
            ["* digits Small affine", "views.preview=false", "views.policies.all.affine.shear"],
            "loss=",
        ),
        (
            "gamma optimizer.lr=9",
            ["loss=vicreg gamma=10.0", "loss=sigreg gamma=0.1", "optimizer=sgd optimizer.lr=0.05 peak"],
            "alpha",
        ),
        ("diagnostics tau", ["diagnostics.num_images=260", "loss=simclr tau=0.2"], "embedding"),
        (
            "relation=noisy",
            ["relation@relation.base= * labels", "[a number from 0 to 1]", "[text or null]"],
            "loss=",
        ),
        ("experiment=supcon loss=vicreg", ["tau: 0.1 #", "* vicreg VICReg", "beta="], "epochs="),
        (
            "relation.base.k",
            ["relation@relation.base=neighbors relation.base.k=1 neigh", "=walks rel"],
            "seed",
        ),
        ("probe.classifiers.knn", ["probe.classifiers={linear,knn,ridge} by the names"], "every"),
        ("hydra.run.dir", ["of Hydra: https", "hydra.run.dir=outputs/${hydra:"], "sweep"),
        (
            "hydra.launcher.timeout_min",
            ["hydra/launcher=slurm hydra.launcher.timeout_min=240 time"],
            "joblib",
        ),
        ("hydra/launcher=slurm", ["* slurm Run the jobs", "hydra.launcher.timeout_min=240 time"], "[an int"),
    ],
)
def test_help_of_named_groups_and_options(ssl_run, command: str, parts: list[str], absent: str) -> None:
    code, out, err = ssl_run(f"--help {command}")
    assert (code, err) == (0, "")
    assert [part for part in parts if part not in flat(out)] == []
    assert absent not in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("lr", "--help lr: expected a group or an option. Did you mean optimizer.lr or probe.finetune.lr?"),
        (
            "temperature",
            "--help temperature: expected a group or an option. Did you mean tau? List all: ssl-run",
        ),
        ("optimiser", "Did you mean optimizer?"),
        ("weights", "weights was renamed: use init_weights\n"),
        ("views nonsense", "--help nonsense: expected a group or an option. List all: ssl-run --help"),
        ("loss=simclrr", "Unknown loss 'simclrr'. Did you mean 'simclr'?"),
    ],
)
def test_help_of_an_unknown_name_is_refused(ssl_run, command: str, message: str) -> None:
    code, out, err = ssl_run(f"--help {command}")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_comments_are_read_by_dotted_key() -> None:
    text = """
# above
a: 1            # one
                # and more
b:              # a node
  c: 'x # y'    # quoted
  d: [1, 2]     # list
  # alone
  e: {f: "#"}
g: a#b          # glued
defaults:
  - h: 1        # no option
"""
    assert read_comments(text) == {
        "a": "one and more",
        "b": "a node",
        "b.c": "quoted",
        "b.d": "list",
        "g": "glued",
    }


def test_version_names_package_torch_and_commit(ssl_run) -> None:
    root = Path(__file__).parent.parent
    code, out, err = ssl_run("--version")
    assert (code, err) == (0, "")
    found = re.fullmatch(r"ssl_runner (\S+), torch (\S+), commit ([0-9a-f]{40})(-dirty)?\n", out)
    assert found
    assert found[1] == ssl_runner.__version__
    assert torch.__version__.startswith(found[2])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert found[3] == head.stdout.strip()


@pytest.mark.parametrize("option", ["--help", "--cfg=job", "--version"])
def test_command_that_runs_nothing_does_not_import_torch(option: str) -> None:
    """Importing torch would take most of the one second allowed for these commands."""
    script = (
        f"import sys; sys.argv = ['ssl-run', {option!r}]\n"
        "from ssl_runner.cli import main\n"
        "main()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout.splitlines()) > 1
