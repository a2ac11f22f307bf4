"""Rules for the values of options, and parts of error messages. No Hydra, no torch."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ssl_runner.errors import UsageError
from ssl_runner.names import (
    COMPILE,
    DENOMINATORS,
    FEATURES,
    FORWARD,
    KEEP,
    MAPS,
    ON_ERROR,
    PRECISIONS,
    REDUCTIONS,
    STEMS,
    STORAGE,
    VARIANCES,
)
from ssl_runner.rule import Rule
from ssl_runner.view_layout import check_views


def _positive(kind: type[int] | type[float], optional: bool = False) -> Rule:
    return (
        Rule(kind, low=0, open_low=True, optional=optional)
        if kind is float
        else Rule(kind, low=1, optional=optional)
    )


RULES = {
    "V": Rule(int, low=2, high=10_000),
    "epochs": _positive(int),
    "batch_size": _positive(int),
    "seed": Rule(int, low=0, high=2**32 - 1),
    "precision": Rule(str, choices=PRECISIONS),
    "deterministic": Rule(bool),
    "compile": Rule(str, choices=COMPILE, or_bool=True),
    "forward": Rule(str, choices=FORWARD),
    "init_weights": Rule(str, optional=True),
    "resume": Rule(str, optional=True),
    "profile": Rule(bool),
    "tags": Rule(str, optional=True, many=True, or_int=True),
    "note": Rule(str, optional=True, or_int=True),
    "dataset.val_fraction": Rule(float, low=0, high=0.9, open_low=True),
    "dataset.test_fraction": Rule(float, low=0, high=0.9),
    "dataset.subset": _positive(int, optional=True),
    "dataset.split_seed": Rule(int, low=0, high=2**32 - 1),
    "dataset.storage": Rule(str, choices=STORAGE),
    "dataset.eval_resize": Rule(int, low=4, optional=True),
    "dataset.eval_crop": Rule(int, low=4, optional=True),
    "dataset.root": Rule(str, optional=True),
    "dataset.files": Rule(str, optional=True),
    "dataset.labels": Rule(bool, optional=True),
    "dataset.on_error": Rule(str, choices=ON_ERROR),
    "dataset.size": Rule(int, low=4, optional=True),
    **{f"dataset.{name}": Rule(str) for name in ("image", "train")},
    **{f"dataset.{name}": Rule(str, optional=True) for name in ("label", "test", "unlabeled")},
    "dataset.cache": Rule(str),
    "dataset.channels": Rule(int, choices=(1, 3), optional=True),
    "backbone.width": _positive(int),
    "backbone.stem": Rule(str, choices=STEMS),
    "projector.width": _positive(int),
    "projector.depth": _positive(int),
    "projector.K": _positive(int),
    "optimizer.lr": _positive(float),
    "optimizer.weight_decay": Rule(float, low=0),
    "optimizer.warmup_epochs": Rule(float, low=0),
    "optimizer.final_lr_ratio": Rule(float, low=0, high=1),
    "optimizer.clip_grad_norm": _positive(float, optional=True),
    "optimizer.trust_coeff": _positive(float),
    "optimizer.trust_clip": Rule(bool),
    "relation.k": _positive(int),
    "relation.queue": Rule(int, low=0),
    "relation.path": Rule(str, optional=True),
    "relation.weighted": Rule(bool),
    "relation.steps": _positive(int),
    "relation.rewire_fraction": Rule(float, low=0, high=1),
    "solver.passes": _positive(int),
    "solver.ridge": Rule(float, low=0),
    "probe.every": Rule(int, low=0),
    "probe.keep": Rule(str, choices=KEEP),
    "probe.layer": Rule(str, optional=True, or_int=True),
    "probe.draws": _positive(int),
    "probe.cache": Rule(bool),
    "probe.finetune.epochs": _positive(int),
    "probe.finetune.batch_size": Rule(int, low=2),
    "probe.finetune.lr": _positive(float),
    "probe.finetune.weight_decay": Rule(float, low=0),
    "embedding.method": Rule(str, choices=MAPS),
    "embedding.images": _positive(int),
    "logger.mode": Rule(str, choices=("online", "offline"), optional=True),
    "diagnostics.every": Rule(int, low=0),
    "diagnostics.num_images": Rule(int, low=2),
}
# For the losses in ssl_runner.loss. Options of a custom loss are checked by type, and by the loss itself.
LOSS_RULES = {
    "alpha": Rule(float, low=0),
    "beta": Rule(float, low=0),
    "gamma": Rule(float, low=0),
    "variance": Rule(str, choices=VARIANCES),
    "tau": _positive(float),
    "reduction": Rule(str, choices=REDUCTIONS),
    "denominator": Rule(str, choices=DENOMINATORS),
    "directions": _positive(int),
    "per_view": Rule(bool),
    "unit_rows": Rule(bool),
    "whitening_size": Rule(int, low=2, optional=True),
}
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
MISSING = object()


def check_values(config: DictConfig, evaluation: bool = False) -> None:
    """Raise UsageError for values that are not accepted, in a run or in an `evaluation` of a finished run.

    Needs no reference configuration, so it can also check a configuration built in Python.
    """
    if config.views.get("_target_") == "ssl_runner.views.Augment":
        try:
            check_views(config.views, config.V, config.backbone._target_ == "ssl_runner.backbone.linear")
        except ValueError as error:
            raise UsageError(str(error)) from error
    ours = str(config.loss.get("_target_")).startswith("ssl_runner.loss.")
    rules = RULES | base_rules(config.relation) | (LOSS_RULES if ours else {})
    if str(config.dataset.get("_target_")).endswith(".image_folder.folder"):
        rules["dataset.root"] = replace(RULES["dataset.root"], many=True)
    check_rules(config, rules)
    check_device("device", config.device)
    check_probes(config.probe, evaluation)
    crop, resize = (config.dataset.get(name) for name in ("eval_crop", "eval_resize"))
    if crop is not None and resize is not None and crop > resize:
        raise UsageError(
            f"dataset.eval_crop={crop}: expected at most dataset.eval_resize={resize}; use a smaller crop"
        )
    resolutions = config.views.resolutions
    if resolutions is not None and not is_list(resolutions, Rule(int, low=4).accepts):
        raise UsageError(
            f"views.resolutions={format_value(resolutions)}: expected a list of integers >= 4,"
            " such as [16,24,32], or null"
        )
    if OmegaConf.select(config, "embedding.method") == "umap" and find_spec("umap") is None:
        raise UsageError(
            "embedding.method=umap: expected umap-learn to be installed; run pip install 'ssl_runner[umap]'"
        )
    if config.optimizer.warmup_epochs > config.epochs:
        given = f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}"
        raise UsageError(
            f"{given}: expected at most epochs={config.epochs}; use a shorter warmup or more epochs"
        )


def check_rules(config: DictConfig, rules: Mapping[str, Rule]) -> None:
    """Raise UsageError for the first option that its rule does not accept. Absent options are skipped."""
    for key, rule in rules.items():
        value = OmegaConf.select(config, key, default=MISSING)
        if value is not MISSING and not rule.accepts(value):
            raise UsageError(f"{key}={format_value(value)}: expected {rule}")


def is_list(values: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether a value is a non-empty list of accepted values."""
    return isinstance(values, ListConfig) and len(values) > 0 and all(map(accepts, values))


def check_probes(probe: DictConfig, evaluation: bool) -> None:
    """Raise UsageError for invalid values of `probe.*`, as `check_values` does."""
    for name, accepted in (("probes", probe_names(probe)), ("features", FEATURES)):
        values = probe[name]
        if not is_list(values, accepted.__contains__) or len(set(values)) < len(values):
            raise UsageError(
                f"probe.{name}={format_value(values)}: expected a non-empty list of {', '.join(accepted)}"
                f" without repeats{hint(name, values, accepted)}"
            )
    if "finetune" in probe.probes and not evaluation:
        raise UsageError(
            f"probe.probes={format_value(probe.probes)}: expected probes of frozen features; run"
            " ssl-probe FOLDER probe=finetune after the run"
        )
    share = Rule(float, 0, 1, open_low=True)
    labels = probe.get("labels")
    if labels is not None and not (is_list(labels, share.accepts) and len(set(labels)) == len(labels)):
        raise UsageError(
            f"probe.labels={format_value(labels)}: expected a list of different numbers > 0 and <= 1, such as"
            " [0.01,0.1], or null"
        )
    features = f"probe.features={format_value(probe.features)}"
    if "backbone" not in probe.features and not evaluation:
        raise UsageError(
            f"{features}: expected a list that includes backbone; add it, because the result of a run is the"
            " accuracy of its backbone features"
        )
    if "lda" in probe.features and labels is not None:
        raise UsageError(
            f"{features}: expected a list without lda, which is fitted on all labels; leave it out, or leave"
            " out probe.labels"
        )
    if probe.keep == "best" and not probe.every:
        raise UsageError("probe.keep=best: expected probe.every >= 1; add probe.every=1, or use keep=last")


def hint(name: str, values: Any, accepted: Iterable[str]) -> str:
    """Return where `probe.probes=[finetune]` belongs, or ""."""
    if name == "probes" and isinstance(values, ListConfig) and "finetune" in {*values} - {*accepted}:
        return "; to fine-tune, run ssl-probe FOLDER probe=finetune after the run"
    return ""


def check_device(option: str, value: Any) -> None:
    """Raise UsageError for a device that is not accepted."""
    if not DEVICES.fullmatch(str(value)):
        raise UsageError(f"{option}={value}: expected one of auto, cpu, cuda, cuda:<number>, mps")


def probe_names(probe: DictConfig) -> tuple[str, ...]:
    """Return the names that `probe.probes` accepts."""
    return (*map(str, probe.classifiers), *(["finetune"] if "finetune" in probe else []))


def base_rules(relation: DictConfig) -> dict[str, Rule]:
    """Return the rules of relation.* for every nested relation: relation.base.*, relation.base.base.*, ..."""
    rules, path, node = {}, "relation.", relation.get("base")
    while isinstance(node, DictConfig):
        path, node = f"{path}base.", node.get("base")
        for key, rule in RULES.items():
            if key.startswith("relation."):
                rules[path + key.removeprefix("relation.")] = rule
    return rules


def format_value(value: Any) -> str:
    """Format a value as on the command line, with quotes around strings such as "3", "true" and "null"."""
    if isinstance(value, ListConfig | list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{format_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        return repr(value) if re.fullmatch(r"[-+.\d]+|true|false|null", value) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(given: str, accepted: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean '...'?" with the closest accepted name after `prefix`, or "" if none is close."""
    accepted = list(accepted)
    tails = [name for name in accepted if name.rpartition(".")[2] == given]  # lr stands for optimizer.lr
    near = tails or difflib.get_close_matches(given, accepted, n=1)
    return f" Did you mean '{prefix}{near[0]}'?" if near else ""


def dotted_keys(config: DictConfig, path: str = "") -> Iterator[str]:
    """Yield the dotted names of all values below a node."""
    for name in map(str, config):
        value = None if OmegaConf.is_missing(config, name) else config[name]
        if isinstance(value, DictConfig):
            yield from dotted_keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"
