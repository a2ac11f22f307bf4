"""Does an augmentation fit the labels? The label fit of a view policy, and with each operation left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from ssl_runner.build import build_backbone, read_data
from ssl_runner.data.dataset import DataSet
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.data.splits import balanced_order
from ssl_runner.errors import UsageError
from ssl_runner.probe import extract
from ssl_runner.relation.builders import FromViews
from ssl_runner.runs import weights
from ssl_runner.runs.files import atomic_write
from ssl_runner.theory.label_fit import LabelFit, RandomFourier, label_fit
from ssl_runner.theory.solver import stream_moments
from ssl_runner.views import Augment

Policies = dict[str, dict[str, Any]]
# operations whose parts are left out one by one, and the values with which a part does nothing
PARTS: dict[str, dict[str, Any]] = {
    "affine": {"degrees": 0, "translate": 0, "scale": [1, 1], "shear": 0},
    "jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
}
KERNEL_WIDTH_IMAGES = 500  # images whose distances give the width of the kernel
DIMENSIONS = 1024  # of the kernel's random features
BATCH = 256  # images
WIDTH = 24  # characters of the first column in the terminal


def variants(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, Policies]:
    """The policies, and the same without each operation, and with each operation alone.

    The parts of `affine` and `jitter` count as operations of their own. An operation of several policies is
    left out of all of them. Raises UsageError if there is no operation.
    """
    names = list(dict.fromkeys(name for policy in policies.values() for name in operations(policy)))
    if not names:
        raise UsageError("views: expected policies with at least one operation; use another choice of views")

    def only(kept: Sequence[str]) -> Policies:
        return {
            name: with_operations(policy, [one for one in operations(policy) if one in kept])
            for name, policy in policies.items()
        }

    result = {"all operations": only(names)}
    if len(names) > 1:
        result |= {f"without {name}": only([other for other in names if other != name]) for name in names}
        result |= {f"only {name}": only([name]) for name in names}
    return result


def operations(policy: Mapping[str, Any]) -> list[str]:
    """Names of the operations of a policy, such as crop and affine.shear, without those that do nothing."""
    names = []
    for name, setting in policy.items():
        if name in PARTS:
            names += [
                f"{name}.{part}"
                for part, neutral in PARTS[name].items()
                if plain(setting.get(part, neutral)) != neutral
            ]
        elif setting:
            names.append(name)
    return names


def with_operations(policy: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The policy with these operations only."""
    result: dict[str, Any] = {}
    for name, setting in policy.items():
        parts = [part for part in PARTS.get(name, ()) if f"{name}.{part}" in kept]
        if parts:
            neutral = {part: value for part, value in PARTS[name].items() if part not in parts}
            result[name] = {**setting, **neutral}
        elif name in kept:
            result[name] = setting
    return result


def plain(value: Any) -> Any:
    """A value of the configuration, with lists as lists of Python."""
    return list(value) if isinstance(value, Sequence) else value


class RelationFit:
    """Measures `label_fit` for several policies on the same images and features.

    The labelled training images are split into two halves with equal class shares: the moments come from
    `passes` passes over views of the first, the energy from the images of the second. At most `images` images
    are used in total. The test split is not used. `features` is "kernel" (`RandomFourier` of D dimensions) or
    "backbone" (the frozen backbone of the configuration). Raises UsageError for a data set without labels or
    with fewer than 4 images per class.
    """

    def __init__(self, cfg: DictConfig, device: torch.device, *, images: int, passes: int, features: str):
        data = read_data(cfg, device)
        if not data.classes:
            raise UsageError(f"dataset={data.name}: expected labels; use a data set with classes")
        order = torch.from_numpy(balanced_order(data.train.y.cpu().numpy(), cfg.dataset.split_seed))[:images]
        if len(order) < 4 * len(data.classes):
            raise UsageError(
                f"{len(order)} images of {len(data.classes)} classes: expected 4 or more of each class;"
                " use more images"
            )
        half = len(order) // 2
        fit, held_out = (
            replace(data.train, indices=data.train.indices[part]) for part in (order[:half], order[half:])
        )
        self.cfg, self.passes, self.classes = cfg, passes, len(data.classes)
        self.data: DataSet = replace(data, pretrain=fit)
        self.y = held_out.y.cpu()
        self.network = self._network(features, device)
        self.features = extract(self.network, held_out, data.mean, data.std).cpu()

    def _network(self, features: str, device: torch.device) -> nn.Module:
        if features == "kernel":
            few = replace(self.data.pretrain, indices=self.data.pretrain.indices[:KERNEL_WIDTH_IMAGES])
            pixels = extract(nn.Flatten(), few, self.data.mean, self.data.std)
            return RandomFourier(pixels, DIMENSIONS, self.cfg.seed)
        backbone = build_backbone(self.cfg, self.data, device)
        if self.cfg.init_weights is not None:
            weights.load_backbone(backbone, self.cfg.init_weights)
        return backbone.eval()

    def __call__(self, policies: Policies, K: int) -> LabelFit:
        """The fit of one policy, for up to K directions."""
        loader = MultiViewLoader(
            self.data,
            Augment(policies),
            V=self.cfg.V,
            batch_size=min(BATCH, len(self.data.pretrain)),
            seed=self.cfg.seed,
            epochs=self.passes,
        )
        moments = stream_moments(self.network, self.features.shape[1], loader, FromViews(), self.passes)
        return label_fit(moments.centred(), self.features, self.y, K)


def columns(fit: LabelFit, classes: int) -> dict[str, float]:
    """energy and rho at classes - 1 directions and at all of them, and the area under the energy."""
    K = len(fit.energy)
    few = min(classes - 1, K)
    return {
        f"energy_{few}": float(fit.energy[few - 1]),
        f"energy_{K}": float(fit.energy[-1]),
        "area": float(fit.energy.mean()),
        f"rho_{few}": float(fit.rho[few - 1]),
        f"rho_{K}": float(fit.rho[-1]),
    }


def line(row: Mapping[str, Any], header: bool) -> str:
    """A row of the table in the terminal, below the names of its columns if `header`."""
    name, *values = row.values()
    text = f"{name:{WIDTH}}" + "".join(f"{value:11.3f}" for value in values)
    names = f"{'views':{WIDTH}}" + "".join(f"{column:>11}" for column in list(row)[1:])
    return f"{names}\n{text}" if header else text


def write(rows: Sequence[Mapping[str, Any]], title: str, table: Path, chart: Path) -> None:
    """Write the rows as a CSV, and the area of each as a bar chart with that of the first as a line."""
    from matplotlib.figure import Figure  # loads slowly

    frame = pd.DataFrame(rows)
    with atomic_write(table) as file:
        frame.to_csv(file, index=False)
    figure = Figure(figsize=(7, 1 + 0.35 * len(frame)), layout="constrained")
    axes = figure.subplots()
    kinds = frame.views.str.split().str[0].map({"all": "C0", "without": "C1", "only": "C2"})
    axes.barh(frame.views, 100 * frame.area, color=kinds)
    axes.axvline(100 * frame.area[0], color="C0", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("label variance in the directions that views preserve best (area, per cent)")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(chart) as file:
        figure.savefig(file, dpi=120, format="png")
