"""Does an augmentation fit the labels? The label fit of the views, and with each operation left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from ssl_runner.build import build_backbone, build_node, read_data
from ssl_runner.checks import check_blur, check_view_sizes
from ssl_runner.data.images import Images
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.data.splits import balanced_order, hold_out
from ssl_runner.errors import UsageError, counted
from ssl_runner.probe import extract
from ssl_runner.relation.builders import FromViews
from ssl_runner.runs import weights
from ssl_runner.runs.files import atomic_write
from ssl_runner.theory.label_fit import label_fit
from ssl_runner.theory.solver import ClosedForm, stream_moments
from ssl_runner.views import Augment

Policies = dict[str, dict[str, Any]]
# operations whose parts are left out one by one, and the values with which a part does nothing
PARTS: dict[str, dict[str, Any]] = {
    "affine": {"degrees": 0, "translate": 0, "scale": [1, 1], "shear": 0},
    "jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
}
LAYOUT = ("size", "count")  # keys of a policy that are not operations
BATCH = 256  # images
WIDTH = 26  # characters of the first column in the terminal


def variants(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, Policies]:
    """The policies, and the same without each operation, and with each operation alone.

    The parts of `affine` and `jitter` count as operations of their own. An operation of several policies is
    left out of all of them. Raises UsageError if there is no operation.
    """
    names = list(dict.fromkeys(name for policy in policies.values() for name in operations(policy)))
    if not names:
        raise UsageError("views: expected policies with at least one operation; use another choice of views")

    def only(kept: Sequence[str]) -> Policies:
        return {name: with_operations(policy, kept) for name, policy in policies.items()}

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
            names += [f"{name}.{part}" for part in parts_in_use(name, setting)]
        elif setting and name not in LAYOUT:
            names.append(name)
    return names


def parts_in_use(name: str, setting: Mapping[str, Any] | None) -> list[str]:
    """The parts of `affine` or `jitter` that do something."""
    given = {part: value for part, value in (setting or {}).items() if part in PARTS[name]}
    return [part for part, value in given.items() if plain(value) != PARTS[name][part]]


def with_operations(policy: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The policy with these operations only, and with its size and count."""
    result: dict[str, Any] = {}
    for name, setting in policy.items():
        if name in PARTS:
            used = parts_in_use(name, setting)
            neutral = {part: PARTS[name][part] for part in used if f"{name}.{part}" not in kept}
            if len(neutral) < len(used):
                result[name] = {**setting, **neutral}
        elif name in LAYOUT or name in kept:
            result[name] = setting
    return result


def plain(value: Any) -> Any:
    """A value of the configuration, with lists as lists of Python."""
    return list(value) if isinstance(value, Sequence) else value


class RelationFit:
    """Measures `label_fit` for several policies on the same images and features.

    The features are those of the backbone as it is before training. At most `images` labelled training images
    are split into two halves, stratified by class: the moments come from `passes` passes over views of the
    first, the energy from the images of the second. The validation and test splits are not used.

    Raises UsageError for views that have no policies or do not fit the images or the backbone, for a data set
    without labels, and for fewer than 4 images per class.
    """

    def __init__(self, cfg: DictConfig, device: torch.device, *, images: int, passes: int):
        augment = build_node("views", cfg.views, without=("preview", "resolutions"))
        if type(augment) is not Augment:
            raise UsageError(
                f"views={type(augment).__name__}: expected Augment, with policies; use views=crop"
            )
        self.variants = variants(cfg.views.policies)
        self.cfg, self.passes, self.data = cfg, passes, read_data(cfg, device)
        first, held_out = self._halves(images)
        self.backbone = build_backbone(cfg, self.data, device)
        check_view_sizes(cfg, augment, ClosedForm, self.backbone, self.data)
        check_blur(cfg, augment, self.data)
        if cfg.init_weights is not None:
            weights.load_backbone(self.backbone, Path(cfg.init_weights).expanduser())
        self.y = held_out.y.cpu()
        self.features = extract(self.backbone, held_out, self.data.mean, self.data.std).cpu()
        self.data = replace(self.data, pretrain=first)

    def _halves(self, images: int) -> tuple[Images, Images]:
        """The images for views, as stored, and the other ones, with the evaluation transform."""
        data, seed = self.data, self.cfg.dataset.split_seed
        y = data.train.y.cpu().numpy()
        if not data.classes:
            raise UsageError(f"dataset={data.name}: expected labels; use a data set with classes")
        chosen = balanced_order(y, seed)[:images]
        if len(chosen) < 4 * len(data.classes) or (np.bincount(y[chosen]) > 1).sum() < 2:
            raise UsageError(
                f"{counted(len(chosen), 'labelled image')} of"
                f" {counted(len(data.classes), 'class', 'classes')}: expected at least 4 per class and 2"
                " classes; use more images"
            )
        halves = hold_out(chosen, y, 0.5, seed)
        assert halves is not None
        first, held_out = (data.train.indices[torch.from_numpy(half)] for half in halves)
        return replace(data.pretrain, indices=first), replace(data.train, indices=held_out)

    def __call__(self, policies: Policies) -> dict[str, float]:
        """Columns of one row. Raises EqualViews.

        energy_k and rho_k for k = C - 1 and energy_k for 2 (C - 1), for C classes, and area: the mean of
        energy_1 ... energy_{2 (C - 1)}. A backbone with fewer features has fewer directions.
        """
        loader = MultiViewLoader(
            self.data,
            Augment(policies),
            V=self.cfg.V,
            batch_size=min(BATCH, len(self.data.pretrain)),
            seed=self.cfg.seed,
            epochs=self.passes,
        )
        moments = stream_moments(self.backbone, self.features.shape[1], loader, FromViews(), self.passes)
        few = min(len(self.data.classes) - 1, self.features.shape[1])
        K = min(2 * (len(self.data.classes) - 1), self.features.shape[1])
        fit = label_fit(moments.centred(), self.features, self.y, K)
        last = min(few, len(fit.rho)) - 1  # fewer directions if features are constant or dependent
        return {
            f"energy_{few}": float(fit.energy[last]),
            f"energy_{K}": float(fit.energy[-1]),
            "area": float(fit.energy.mean()),
            f"rho_{few}": float(fit.rho[last]),
        }


def line(name: str, values: Iterable[str | float]) -> str:
    """A row of the table in the terminal, with - for nan."""
    cells = [value if isinstance(value, str) else f"{value:.3f}".replace("nan", "-") for value in values]
    return f"{name:{WIDTH}}" + "".join(f"{cell:>11}" for cell in cells)


def write(rows: Sequence[Mapping[str, Any]], title: str, table: Path, chart: Path) -> None:
    """Write the rows as a CSV, and their first measure as bars, with that of the first row as a line."""
    from matplotlib.figure import Figure  # loads slowly

    frame = pd.DataFrame(rows)
    with atomic_write(table) as file:
        frame.to_csv(file, index=False)
    frame = frame.dropna()
    measure = str(frame.columns[1])
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(frame)), layout="constrained")
    axes = figure.subplots()
    colors = frame.views.str.split().str[0].map({"all": "C0", "without": "C1", "only": "C2"})
    axes.barh(frame.views, 100 * frame[measure], color=colors)
    axes.axvline(100 * frame[measure].iloc[0], color="C0", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"{measure}: label variance in the directions that views preserve best (%)")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(chart) as file:
        figure.savefig(file, dpi=120, format="png")
