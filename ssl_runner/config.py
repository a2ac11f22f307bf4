"""Checks a command line before any work starts, every job of a sweep, without importing torch: unknown keys, types, ranges."""

import argparse
import difflib
import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_runner.errors import Refused

PACKAGE = Path(__file__).parent
CONF = (
    PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
)  # in a wheel, in a checkout


@dataclass
class Rule:
    """What a setting accepts: a kind of value, within bounds, or one of some choices; null if `optional`."""

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
                text += f" {'above' if self.open_low else 'from'} {self.low} {'and up to' if self.open_low else 'to'} {self.high}"
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
    "precision": Rule(str, choices=("auto", "fp32", "bf16", "fp16")),
    "views_forward": Rule(str, choices=("joint", "separate")),
    "weights": Rule(str, optional=True),
    "resume": Rule(str, optional=True),
    "dataset.val": Rule(float, low=0, high=0.9, open_low=True),
    "dataset.subset": _positive(int, optional=True),
    "dataset.split_seed": Rule(int, low=0, high=2**32 - 1),
    "dataset.location": Rule(str, choices=("auto", "device", "host")),
    "dataset.root": Rule(str, optional=True),
    "dataset.size": Rule(int, low=4, optional=True),
    "backbone.width": _positive(int),
    "projector.width": _positive(int),
    "projector.depth": _positive(int),
    "projector.K": _positive(int),
    "optimizer.lr": _positive(float),
    "optimizer.weight_decay": Rule(float, low=0),
    "optimizer.warmup_epochs": Rule(float, low=0),
    "optimizer.final_lr": Rule(float, low=0, high=1),
    "optimizer.clip": _positive(float, optional=True),
    "relation.k": _positive(int),
    "relation.queue": Rule(int, low=0),
    "relation.path": Rule(str, optional=True),
    "relation.of": Rule(str, choices=("views", "labels", "neighbors", "edges")),
    "relation.p": Rule(float, low=0, high=1),
    "solver.name": Rule(str, choices=("gradient", "closed_form")),
    "solver.passes": _positive(int),
    "solver.ridge": Rule(float, low=0),
    "probe.every": Rule(int, low=0),
    "diagnostics.every": Rule(int, low=0),
    "diagnostics.images": Rule(int, low=2),
    "diagnostics.moments": Rule(int, low=0),
}
LOSS_RULES = {  # of the settings of our own losses; another's are checked by their type, and by the loss itself
    "alpha": Rule(float, low=0),
    "beta": Rule(float, low=0),
    "gamma": Rule(float, low=0),
    "variance": Rule(str, choices=("hinge", "squared")),
    "tau": _positive(float),
    "reduction": Rule(str, choices=("mean", "sum")),
}
PLUGINS = {  # of Hydra, and the extra that installs them
    "hydra/launcher=slurm": ("submitit_launcher", "slurm"),
    "hydra/launcher=joblib": ("joblib_launcher", "sweep"),
    "hydra/sweeper=optuna": ("optuna_sweeper", "sweep"),
}
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
PROBES = ("linear", "knn", "ridge")
FEATURES = ("backbone", "projector", "random_init", "pixels", "pca", "lda")


def register_resolvers() -> None:
    """`${unique:}`: eight random hex digits, the same wherever one run or one sweep asks for them."""
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(4), use_cache=True, replace=True)


def prefer_our_presets() -> None:
    """Takes out of Hydra's store what its plugins have put there under the names of our own choices in conf/hydra: Hydra would
    check ours against theirs, and refuse."""
    Plugins.instance()  # imports them
    for file in (CONF / "hydra").glob("*/*.yaml"):
        ConfigStore.instance().repo.get("hydra", {}).get(file.parent.name, {}).pop(file.name, None)


def check_plugins(overrides: Iterable[Override]) -> None:
    """Refuses a launcher or a sweeper whose plugin is not installed."""
    for override in overrides:
        plugin, extra = PLUGINS.get(str(override.input_line), ("", ""))
        if plugin and find_spec(f"hydra_plugins.hydra_{plugin}") is None:
            raise Refused(
                f"{override.input_line} needs hydra-{plugin.replace('_', '-')}: pip install 'ssl_runner[{extra}]'"
            )


def check(args: argparse.Namespace) -> list[tuple[str, DictConfig]]:
    """Composes every job that the command line asks for: its overrides as written, and its configuration. Raises Refused, with
    one line, for the first that cannot run."""
    for folder in (args.config_dir, args.config_path):
        if folder is not None and not Path(folder).is_dir():
            raise Refused(
                f"{folder} is not a folder: --config-dir takes one that holds <group>/<choice>.yaml"
            )
    search_path = create_config_search_path(str(Path(args.config_path or CONF).resolve()))
    if args.config_dir:
        query = SearchPathQuery(provider="schema")  # where Hydra itself puts it: after our own
        search_path.prepend("command-line", f"file://{Path(args.config_dir).resolve()}", anchor=query)
    Hydra.create_main_hydra2(task_name="check", config_search_path=search_path)
    try:
        composer = Composer(args.config_name or "config")
        all_jobs = jobs(args.overrides, args.multirun)
        return [
            (" ".join(str(o.input_line) for o in overrides), composer.check(overrides))
            for overrides in all_jobs
        ]
    finally:
        GlobalHydra.instance().clear()


def jobs(lines: list[str], multirun: bool) -> list[list[Override]]:
    """The overrides of each job: one list, or in a sweep one for every combination. Ranges that a search strategy samples from
    (interval and the like) have no combinations: they are left out here and checked when their job starts."""
    overrides = parse(lines)
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept and not (multirun or "hydra.mode=MULTIRUN" in lines):
        raise Refused(
            f"{swept[0].input_line} is a sweep: add -m for a run of every value, or write a list as [a,b]"
        )
    finite = [
        override for override in overrides if not override.is_sweep_override() or override.is_discrete_sweep()
    ]
    batches = BasicSweeper.split_arguments(finite, max_batch_size=None)
    if not batches or not batches[0]:
        raise Refused(f"{swept[0].input_line} is a sweep over nothing: give it at least one value")
    return [parse(list(job)) for job in batches[0]]


def parse(lines: list[str]) -> list[Override]:
    """Hydra's reading of the overrides. Refused when one is not group=choice or key=value."""
    try:
        overrides = OverridesParser.create().parse_overrides(lines)
    except HydraException as error:
        message = one_line(error).split(" See https")[0]
        raise Refused(f"{message}: settings are written group=choice or key=value") from error
    for override in overrides:
        if not override.key_or_group:
            raise Refused(
                f"{override.input_line} names no setting: settings are written group=choice or key=value"
            )
    return overrides


class Composer:
    """Composes configurations from one set of folders and says what is wrong with them."""

    def __init__(self, config_name: str):
        self.config_name = config_name
        self.repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
        self.composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}

    def compose(self, lines: Iterable[str]) -> tuple[DictConfig, DictConfig]:
        """The composed configuration and which choice each group has. Refused when Hydra cannot compose it."""
        key = tuple(lines)
        if key in self.composed:  # the jobs of a sweep share most of what is composed here
            return self.composed[key]
        try:
            config = compose(self.config_name, overrides=list(key), return_hydra_config=True)
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file).rpartition("/")
            if not group:
                raise Refused(one_line(error)) from error
            options = self.repository.get_group_options(group)
            accepted = (
                f"{group} is one of {', '.join(options)}"
                if options
                else f"{group} has none; --config-dir can add some"
            )
            raise Refused(
                f"{group}={choice} is not a choice{nearest(choice, options)}; {accepted}"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise Refused(one_line(error.__cause__ or error)) from error
        own = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
        return self.composed.setdefault(key, (own, config.hydra.runtime.choices))

    def check(self, overrides: list[Override]) -> DictConfig:
        """The configuration of the job of these overrides. Raises Refused when it cannot run."""
        mine = [
            override for override in overrides if not override.key_or_group.startswith(("hydra.", "hydra/"))
        ]
        groups = [override for override in mine if self.repository.group_exists(override.key_or_group)]
        for override in groups:
            self.check_choice(override)
        _, chosen = self.compose(str(override.input_line) for override in groups)
        reference = self.reference(
            chosen, {override.key_or_group for override in groups if override.is_add()}
        )
        for override in mine:
            if override not in groups:
                self.check_key(override, reference, chosen)
        config, _ = self.compose(str(override.input_line) for override in mine)
        for key in map(str, config):
            if key == "experiment":
                raise Refused(
                    f"experiment={chosen.experiment}: its file must begin with the line # @package _global_"
                )
            if key not in reference:
                raise Refused(self.unknown(key, reference, chosen))
        check_tree(config, reference)
        check_values(config)
        if config.solver.name != reference.solver.name:
            raise Refused(
                f"solver.name={config.solver.name} is not a setting: choose it by solver={config.solver.name}"
            )
        if config.solver.name == "closed_form" and config.backbone._target_ == "ssl_runner.backbone.linear":
            self.check_only_matrix(config, mine)
        if config.resume not in (None, "auto") and not any(
            override.key_or_group == "resume" for override in mine
        ):
            raise Refused(f"resume={config.resume} stands in a file: give it on the command line")
        return config

    def check_only_matrix(self, config: DictConfig, overrides: list[Override]) -> None:
        """Refuses what says something of a projector or of weights where the linear backbone itself is what is solved for."""
        solved = "solver=closed_form backbone=linear solves for the backbone itself"
        for override in overrides:
            if override.key_or_group.startswith("projector") and not config.projector._target_.endswith(
                ".identity"
            ):
                raise Refused(
                    f"{override.input_line}: {solved}, without a projector: leave it out; K is backbone.width"
                )
        if config.weights is not None:
            raise Refused(f"weights={config.weights}: {solved} and starts from no weights: leave it out")

    def check_choice(self, override: Override) -> None:
        """Refuses a group override that does not name one choice."""
        group, options = override.key_or_group, self.repository.get_group_options(override.key_or_group)
        one_choice = isinstance(override.value(), str) and not override.is_delete()
        if not one_choice and not (group == "experiment" and override.value() is None):
            raise Refused(f"{override.input_line}: {group} is one of {', '.join(options) or '(none yet)'}")
        if override.is_add() and group == "experiment":
            raise Refused(f"{override.input_line}: write experiment={override.value()}")

    def reference(self, chosen: DictConfig, added: set[str]) -> DictConfig:
        """The configuration of the chosen groups alone, without an experiment or single values: it says which keys there are."""
        lines = tuple(
            f"{'+' if group in added else ''}{group}={choice}"
            for group, choice in ((str(group), choice) for group, choice in chosen.items())
            if choice is not None and group != "experiment" and not group.startswith("hydra/")
        )
        return self.compose(lines)[0]

    def check_key(self, override: Override, reference: DictConfig, chosen: DictConfig) -> None:
        """Refuses a key that the chosen groups do not have. Arguments may be added (`+`) below whatever has a `_target_`."""
        key = override.key_or_group
        node: Any = reference
        known, open_ended = True, False
        for name in key.split("."):
            if known and isinstance(node, DictConfig) and name in node:
                parent, node = node, node[name]
            else:
                known, node = False, None
            open_ended = open_ended or (isinstance(node, DictConfig) and "_target_" in node)
        if (
            known
            and key.startswith("loss.")
            and OmegaConf.is_interpolation(parent, name)
            and name in reference
        ):
            raise Refused(
                f"{override.input_line}: set it at the root, {name}={override.get_value_element_as_str()}"
            )
        if override.is_add() and known:
            raise Refused(
                f"{override.input_line}: {key} is there already; write {str(override.input_line).lstrip('+')}"
            )
        if override.is_delete() and known:
            raise Refused(
                f"{override.input_line}: {key} cannot be removed; set it, to null where it accepts that"
            )
        if not known and not (override.is_add() and open_ended):
            raise Refused(
                self.unknown(key, reference, chosen, str(override.input_line) if open_ended else None)
            )

    def unknown(
        self, key: str, reference: DictConfig, chosen: DictConfig, argument: str | None = None
    ) -> str:
        """What to say of a key that is not there: whose setting it is, the nearest that is, how to add it as an argument."""
        group, _, name = key.rpartition(".")
        group = group or "loss"  # whose settings stand at the root
        if self.repository.group_exists(group):
            settings = {
                choice: self.settings(group, choice) for choice in self.repository.get_group_options(group)
            }
            owners = [f"{group}={choice}" for choice, names in settings.items() if name in names]
            if owners:
                choice = chosen[group]
                own = ", ".join(settings.get(choice, [])) or "none"
                return (
                    f"{key} is a setting of {' and '.join(owners)}, not of {group}={choice} (settings: {own})"
                )
        keys = [*dotted_keys(reference), *map(str, reference)]
        add = f", and +{argument} adds an argument" if argument else ""
        return f"{key} is not a setting{nearest(key, keys)}; `ssl-run --cfg job` shows all{add}"

    def settings(self, group: str, choice: str) -> list[str]:
        """The keys of a choice's yaml that a user may set: a loss's at the root, another group's in its own node."""
        content = self.repository.load_config(f"{group}/{choice}").config
        node = content if group == "loss" else content.get(group, content)
        return [key for key in map(str, node) if key not in ("loss", "defaults", "_target_", "name")]


def check_tree(config: DictConfig, reference: DictConfig, path: str = "", open_ended: bool = False) -> None:
    """Refuses keys that the reference lacks (but for arguments below a `_target_`) and values of another type than its own."""
    open_ended = open_ended or "_target_" in reference
    for name in map(str, config):
        key = f"{path}{name}"
        if name not in reference:
            if path and not open_ended:
                raise Refused(
                    f"{key} is not a setting{nearest(str(name), map(str, reference))}; `ssl-run --cfg job` shows all"
                )
            continue
        value, default = config[name], reference[name]
        if isinstance(default, DictConfig):
            if not isinstance(value, DictConfig):
                raise Refused(
                    f"{key}={value}: {key} is a group of settings ({', '.join(map(str, default))}); set one of them"
                )
            if value.get("_target_") == default.get("_target_"):
                check_tree(value, default, f"{key}.", open_ended)
        elif (
            key not in RULES
            and key not in LOSS_RULES
            and default is not None
            and not OmegaConf.is_interpolation(reference, name)
        ):
            rule = Rule(type(default)) if type(default) in (int, float, bool, str) else None
            if (rule and not rule.accepts(value)) or (
                isinstance(default, ListConfig) and not isinstance(value, ListConfig)
            ):
                raise Refused(f"{key}={shown(value)}: {key} is {rule or 'a list'}")


def check_values(config: DictConfig) -> None:
    """Refuses values that are out of range. Needs no reference, so that a configuration made in Python can be checked too."""
    ours = str(config.loss.get("_target_")).startswith("ssl_runner.loss.")
    for key, rule in (RULES | LOSS_RULES if ours else RULES).items():
        value = OmegaConf.select(config, key, default=MISSING)
        if value is not MISSING and not rule.accepts(value):
            raise Refused(f"{key}={shown(value)}: {key} is {rule}")
    if not DEVICES.fullmatch(str(config.device)):
        raise Refused(f"device={config.device}: device is one of auto, cpu, cuda, cuda:<number>, mps")
    for key, accepted in (("probe.probes", PROBES), ("probe.features", FEATURES)):
        values = OmegaConf.select(config, key)
        if (
            not isinstance(values, ListConfig)
            or not values
            or not set(values) <= set(accepted)
            or len(set(values)) < len(values)
        ):
            raise Refused(
                f"{key}={shown(values)}: {key} is a list of different ones of {', '.join(accepted)}"
            )
    sizes = config.views.sizes
    if sizes is not None and not (
        isinstance(sizes, ListConfig) and sizes and all(Rule(int, low=4).accepts(size) for size in sizes)
    ):
        raise Refused(
            f"views.sizes={shown(sizes)}: views.sizes is a list of integers >= 4, such as [16,24,32], or null"
        )
    if "backbone" not in config.probe.features:
        raise Refused(
            f"probe.features={shown(config.probe.features)} lacks backbone, whose accuracy is the run's result: add it"
        )
    if config.optimizer.warmup_epochs > config.epochs:
        given = f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}"
        raise Refused(f"{given} is more than epochs={config.epochs}: warm up for at most all of them")


def identity(config: DictConfig) -> str:
    """What a run is: the SHA-256 of its resolved configuration, seed included; how it was resumed is none of it, and 7 is 7.0."""
    content: Any = OmegaConf.to_container(config, resolve=True)
    del content["resume"]
    numbers = json.loads(json.dumps(content), parse_int=float)
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


MISSING = object()


def shown(value: Any) -> str:
    """A value as one would write it on the command line; text that could pass for something else in quotes."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, str):
        return repr(value) if re.fullmatch(r"[-+.\d]+|true|false|null", value) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def dotted_keys(config: DictConfig, path: str = "") -> Iterator[str]:
    """The full names of all values below a node."""
    for name in map(str, config):
        value = None if OmegaConf.is_missing(config, name) else config[name]
        if isinstance(value, DictConfig):
            yield from dotted_keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def nearest(given: str, accepted: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing when no accepted name is near."""
    accepted = list(accepted)
    tails = [name for name in accepted if name.rpartition(".")[2] == given]  # lr is meant as optimizer.lr
    near = tails or difflib.get_close_matches(given, accepted, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
