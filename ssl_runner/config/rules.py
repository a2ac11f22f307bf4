"""Rules for the values of options, the identity of a run, and parts of error messages. No Hydra, no torch."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ssl_runner.errors import UsageError
from ssl_runner.names import FEATURES, FORWARD, MAPS, PRECISIONS, REDUCTIONS, STORAGE, VARIANCES


@dataclass
class Rule:
    """Accepted values of an option: a type with bounds or a set of choices, and null if `optional`.

    `low` and `high` are inclusive; `open_low` excludes `low`. An int is accepted where a float is expected.
    """

    kind: type[int] | type[float] | type[bool] | type[str]
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind:
            return False
        if self.choices:
            return value in self.choices
        if self.kind in (int, float) and isinstance(value, (int, float)):
            above = value > self.low if self.open_low else value >= self.low
            return above and value <= self.high and math.isfinite(value)
        return True

    def __str__(self) -> str:
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        else:
            text = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[self.kind]
            if self.high < math.inf:
                bounds = (
                    f"> {self.low} and <= {self.high}" if self.open_low else f"from {self.low} to {self.high}"
                )
                text += f" {bounds}"
            elif self.low > -math.inf:
                text += f" {'>' if self.open_low else '>='} {self.low}"
        return text + (" or null" if self.optional else "")


def _positive(kind: type[int] | type[float], optional: bool = False) -> Rule:
    return (
        Rule(kind, low=0, open_low=True, optional=optional)
        if kind is float
        else Rule(kind, low=1, optional=optional)
    )


RULES = {
    "V": Rule(int, low=2),
    "epochs": _positive(int),
    "batch_size": _positive(int),
    "seed": Rule(int, low=0, high=2**32 - 1),
    "precision": Rule(str, choices=PRECISIONS),
    "forward": Rule(str, choices=FORWARD),
    "init_weights": Rule(str, optional=True),
    "resume": Rule(str, optional=True),
    "dataset.val_fraction": Rule(float, low=0, high=0.9, open_low=True),
    "dataset.subset": _positive(int, optional=True),
    "dataset.split_seed": Rule(int, low=0, high=2**32 - 1),
    "dataset.storage": Rule(str, choices=STORAGE),
    "dataset.root": Rule(str, optional=True),
    "dataset.size": Rule(int, low=4, optional=True),
    "backbone.width": _positive(int),
    "projector.width": _positive(int),
    "projector.depth": _positive(int),
    "projector.K": _positive(int),
    "optimizer.lr": _positive(float),
    "optimizer.weight_decay": Rule(float, low=0),
    "optimizer.warmup_epochs": Rule(float, low=0),
    "optimizer.final_lr_ratio": Rule(float, low=0, high=1),
    "optimizer.clip_grad_norm": _positive(float, optional=True),
    "relation.k": _positive(int),
    "relation.queue": Rule(int, low=0),
    "relation.path": Rule(str, optional=True),
    "relation.rewire_fraction": Rule(float, low=0, high=1),
    "solver.passes": _positive(int),
    "solver.ridge": Rule(float, low=0),
    "probe.every": Rule(int, low=0),
    "embedding.method": Rule(str, choices=MAPS),
    "embedding.images": _positive(int),
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
}
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_values(config: DictConfig) -> None:
    """Raise UsageError for values that are not accepted.

    Needs no reference configuration, so it can also check a configuration built in Python.
    """
    ours = str(config.loss.get("_target_")).startswith("ssl_runner.loss.")
    rules = RULES | base_rules(config.relation) | (LOSS_RULES if ours else {})
    for key, rule in rules.items():
        value = OmegaConf.select(config, key, default=MISSING)
        if value is not MISSING and not rule.accepts(value):
            raise UsageError(f"{key}={format_value(value)}: expected {rule}")
    if not DEVICES.fullmatch(str(config.device)):
        raise UsageError(f"device={config.device}: expected one of auto, cpu, cuda, cuda:<number>, mps")
    for key, accepted in (
        ("probe.probes", tuple(map(str, config.probe.classifiers))),
        ("probe.features", FEATURES),
    ):
        values = OmegaConf.select(config, key)
        if (
            not isinstance(values, ListConfig)
            or not values
            or not set(values) <= set(accepted)
            or len(set(values)) < len(values)
        ):
            raise UsageError(
                f"{key}={format_value(values)}: expected a non-empty list of {', '.join(accepted)}"
                " without repeats"
            )
    resolutions = config.views.resolutions
    if resolutions is not None and not (
        isinstance(resolutions, ListConfig)
        and resolutions
        and all(Rule(int, low=4).accepts(size) for size in resolutions)
    ):
        raise UsageError(
            f"views.resolutions={format_value(resolutions)}: expected a list of integers >= 4,"
            " such as [16,24,32], or null"
        )
    if OmegaConf.select(config, "embedding.method") == "umap" and find_spec("umap") is None:
        raise UsageError(
            "embedding.method=umap: expected umap-learn to be installed; run pip install 'ssl_runner[umap]'"
        )
    if "backbone" not in config.probe.features:
        raise UsageError(
            f"probe.features={format_value(config.probe.features)}: expected a list that includes backbone;"
            " add it, because the result of a run is the accuracy of its backbone features"
        )
    if config.optimizer.warmup_epochs > config.epochs:
        given = f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}"
        raise UsageError(
            f"{given}: expected at most epochs={config.epochs}; use a shorter warmup or more epochs"
        )


def base_rules(relation: DictConfig) -> dict[str, Rule]:
    """Return the rules of relation.* for every nested relation: relation.base.*, relation.base.base.*, ..."""
    rules, path, node = {}, "relation.", relation.get("base")
    while isinstance(node, DictConfig):
        path, node = f"{path}base.", node.get("base")
        for key, rule in RULES.items():
            if key.startswith("relation."):
                rules[path + key.removeprefix("relation.")] = rule
    return rules


def run_id(config: DictConfig) -> str:
    """Return the SHA-256 of the resolved configuration without `resume`, which identifies a run.

    The seed is included. Ints and floats compare equal, so 7 and 7.0 give the same digest.
    """
    content: Any = OmegaConf.to_container(config, resolve=True)
    del content["resume"]
    numbers = json.loads(json.dumps(content), parse_int=float)
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


MISSING = object()


def format_value(value: Any) -> str:
    """Format a value as on the command line, with quotes around strings such as "3", "true" and "null"."""
    if isinstance(value, ListConfig | list):
        return f"[{','.join(map(format_value, value))}]"
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
