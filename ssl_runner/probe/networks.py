"""The networks whose features are probed, by name, and the output of one layer as features."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_runner import distributed
from ssl_runner.backbone import Backbone
from ssl_runner.data.dataset import DataSet
from ssl_runner.errors import UsageError
from ssl_runner.model import SSLModel, eval_mode
from ssl_runner.probe.baselines import NoDiscriminants, linear_discriminants, principal_components
from ssl_runner.probe.protocol import Classifier, evaluate
from ssl_runner.probe.shares import LabelDraw

# of `pixels`, `pca` and `lda` of n images with D values each, which need n x D values in float32 a few times
# and square matrices with min(n, D) rows in float64
MAX_PIXELS, MAX_VALUES = 8192, 500_000_000
OF_PIXELS = ("pixels", "pca", "lda")


def affordable(features: Iterable[str], data: DataSet) -> tuple[list[str], str]:
    """Leave out features of the pixels where they need too much memory and time.

    They are probed if the images of train, val and test have at most MAX_VALUES values together, and if
    either each image has at most MAX_PIXELS values or train and val have at most MAX_PIXELS images.

    Returns the other names, each once, and a line about those left out, "" if there are none.
    """
    names = list(dict.fromkeys(features))
    pixels = data.channels * data.image_size**2
    fitted = len(data.train) + len(data.val)
    small = min(pixels, fitted) <= MAX_PIXELS and (fitted + len(data.test)) * pixels <= MAX_VALUES
    if small or not (large := [name for name in names if name in OF_PIXELS]):
        return names, ""
    line = (
        f"probes of {', '.join(large)} are left out: {pixels:,} values per image, {fitted:,} images to fit on"
        f" and {len(data.test):,} to test; expected at most {MAX_VALUES:,} values in all, and"
        f" at most {MAX_PIXELS:,} values per image or {MAX_PIXELS:,} images to fit on"
    )
    return [name for name in names if name not in large], line


def layer_names(layer: str | int | None) -> list[str]:
    """The names of the features that `probe.layer` adds: `backbone.<layer>`, or none."""
    return [] if layer is None else [f"backbone.{layer}"]


def feature_networks(
    data: DataSet, model: SSLModel, fresh_backbone: Callable[[], Backbone], layer: str | int | None
) -> dict[str, Callable[[], nn.Module]]:
    """The networks to probe, by the names of `probe.features`, built on demand.

    With `layer`, the name in `layer_names` gives the output of this layer.
    """
    networks: dict[str, Callable[[], nn.Module]] = {
        "backbone": lambda: model.backbone,
        "projector": lambda: nn.Sequential(model.backbone, model.projector),  # model may be compiled
        "random_init": fresh_backbone,
        "pixels": nn.Flatten,
        "pca": lambda: principal_components(data, model.K),
        "lda": lambda: linear_discriminants(data),
    }
    if layer is not None:
        [name] = layer_names(layer)
        networks[name] = lambda: LayerFeatures(model.backbone, layer)
    return networks


def evaluate_seeded(
    features: str,
    build: Callable[[], nn.Module],
    data: DataSet,
    classifiers: Mapping[str, Classifier],
    draws: Sequence[LabelDraw | None],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `evaluate` for the network that `build` returns, on test as well if there is one.

    Seeds torch for the classifiers, so that rows do not depend on those computed before or read from a cache.
    For a data set without linear discriminants there are no rows, but a line on standard output.
    """
    try:
        network = build()
    except NoDiscriminants as error:
        if distributed.is_main_process():
            print(f"probes of {features} are left out: {error}", flush=True)
        return
    torch.manual_seed(seed)
    yield from evaluate(features, network, data, classifiers, len(data.test) > 0, draws)


@torch.no_grad()
def check_layer(
    backbone: nn.Module, layer: str | int, shape: tuple[int, int, int], device: torch.device
) -> None:
    """Raise UsageError if `LayerFeatures` cannot give features of images (C, H, W) of this shape."""
    network = LayerFeatures(backbone, layer)
    with eval_mode(backbone):
        network(torch.zeros(1, *shape, device=device))


class LayerFeatures(nn.Module):
    """The pooled output of one module of a backbone: images (N, C, H, W) -> features (N, width).

    A map (N, D, h, w) is averaged over its positions and tokens (N, T, D) over T. Raises UsageError if the
    backbone has no module of this name, or in `forward` if its output has another form.
    """

    def __init__(self, backbone: nn.Module, layer: str | int):
        super().__init__()
        self.body = getattr(backbone, "body", backbone)
        self.layer = str(layer)
        if self.layer not in dict(self.body.named_modules()) or not self.layer:
            names = ", ".join(name for name, _ in self.body.named_children()) or "none"
            raise UsageError(
                f"probe.layer={layer}: expected the name of a module of the backbone; use one of {names},"
                " or of a module inside one"
            )

    def forward(self, x: Tensor) -> Tensor:
        pooled: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            pooled.append(self.pool(output))  # at once: a following layer may overwrite its input

        handle = self.body.get_submodule(self.layer).register_forward_hook(keep)
        try:
            self.body(x)
        finally:
            handle.remove()
        if not pooled:
            raise UsageError(
                f"probe.layer={self.layer}: expected a module that the forward pass calls; use another one"
            )
        return pooled[-1]

    def pool(self, output: Any) -> Tensor:
        """The output of the layer as (N, width)."""
        dimensions = output.ndim if isinstance(output, Tensor) else 0
        if dimensions not in (2, 3, 4):
            found = f"shape {tuple(output.shape)}" if dimensions else type(output).__name__
            raise UsageError(
                f"probe.layer={self.layer}: expected an output of shape (N, D), (N, T, D) or (N, D, h, w),"
                f" found {found}; use another layer"
            )
        return torch.mean(output, {3: (1,), 4: (2, 3)}[dimensions]) if dimensions > 2 else output
