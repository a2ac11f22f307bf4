"""Which options a run lacks for exported weights: those by which the tensors of the two backbones differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from ssl_runner.config import hydra_internals
from ssl_runner.config.rules import format_value

WITHOUT_WEIGHTS: Mapping[str, Mapping[str, Any]] = {  # options with which a backbone loads no weights
    "ssl_runner.backbone.resnet": {"weights": None},
    "ssl_runner.backbone.from_timm": {"pretrained": False, "checkpoint_path": ""},
}
IMAGES = {"dataset.channels": "channels", "dataset.size": "image_size"}  # option -> argument of a backbone
Options = dict[str, Any]


def option_lines(backbone: DictConfig) -> list[str]:
    """Return the overrides that select the backbone of the present job: its choice, and what differs from
    the file of the choice. An interpolation in the file counts as different."""
    hydra: Any = HydraConfig.get()
    choice, sources = hydra.runtime.choices.backbone, hydra_internals.config_sources(hydra)
    files = [
        Path(sources[name], f"backbone/{choice}.yaml") for name in ("main", "command-line") if name in sources
    ]
    in_file: Any = OmegaConf.to_container(OmegaConf.load(next(file for file in files if file.exists())))
    values: Any = OmegaConf.to_container(backbone, resolve=True)
    changed = [key for key in values if key not in in_file or in_file[key] != values[key]]
    added = "++" if "defaults" in in_file else "+"  # an option may come from the files in the defaults
    plus = {key: "" if key in in_file else added for key in changed}
    return [
        f"backbone={choice}",
        *(f"{plus[key]}backbone.{key}={format_value(values[key])}" for key in changed),
    ]


def advice(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return how the options of weights differ from those of a run, and what to set. None if they agree.

    ours, theirs: the fields `backbone`, `channels`, `image_size` and, if known, `options` (`option_lines`) of
    the header of exported weights. An option that changes no tensor is left out.
    """
    here, there = options(ours), options(theirs)
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    other = function(ours) != function(theirs)
    if other:
        differing = [key for key in differing if key in IMAGES]
    keys = needed(differing, here, there, theirs["backbone"]["_target_"], ours["backbone"]["_target_"])
    if not other and not keys:
        return None
    given = [f"{'' if key in here else '+'}{key}={format_value(there[key])}" for key in keys if key in there]
    found = [f"{key}={format_value(there.get(key))}" for key in keys]
    expected = [f"{key}={format_value(here.get(key))}" for key in keys]
    if other:
        selected = theirs.get("options") or [function(theirs)]
        given, found, expected = [*selected, *given], [*selected, *found], [function(ours), *expected]
    todo = [f"set {' '.join(given)}"] if given else []
    if absent := [key for key in keys if key not in there]:
        todo.append(f"leave out {' '.join(absent)}")
    return (
        f"expected weights for {' '.join(expected)}, found those for {' '.join(found)}; {' and '.join(todo)}"
    )


def options(header: Mapping[str, Any]) -> Options:
    """The options on which the tensors of a backbone can depend, by name."""
    settings = {key: value for key, value in header["backbone"].items() if key != "_target_"}
    ignored = WITHOUT_WEIGHTS.get(header["backbone"]["_target_"], {})
    of_backbone = {f"backbone.{key}": value for key, value in settings.items() if key not in ignored}
    return of_backbone | {option: header[name] for option, name in IMAGES.items()}


def function(header: Mapping[str, Any]) -> str:
    """The override that selects the function that builds a backbone."""
    module, _, kind = header["backbone"]["_target_"].rpartition(".")
    if module != "ssl_runner.backbone":
        return f"backbone._target_={module}.{kind}"
    name = header["backbone"].get("name")
    return f"backbone={ {'from_timm': 'timm', 'resnet': name}.get(kind, kind) }"


def needed(keys: list[str], here: Options, there: Options, target: str, known: str) -> list[str]:
    """Return those of the keys that a run with the options `here` must take from `there` for equal tensors.

    All of them if the backbone cannot be built with the options `there`. A function is called only if it is
    `known`, or one of ssl_runner: a file of weights may name any function.
    """
    called = target == known or target.startswith("ssl_runner.backbone.")
    expected = shapes(target, there) if called else None
    if expected is None:
        return keys
    kept, current = [], dict(there)
    for key in keys:
        trial = {name: value for name, value in current.items() if name != key}
        trial |= {key: here[key]} if key in here else {}
        if shapes(target, trial) == expected:
            current = trial
        else:
            kept.append(key)
    return kept


def shapes(target: str, of: Options) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the tensors of a backbone with these options, None if it cannot be built."""
    arguments = {IMAGES.get(key, key.removeprefix("backbone.")): value for key, value in of.items()}
    try:
        network = get_method(target)(**arguments, **WITHOUT_WEIGHTS.get(target, {}))
    except Exception:  # of any network
        return None
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
