"""The trained network of a run, with the preprocessing of its input, for use in other code."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn

from ssl_runner.data import decode
from ssl_runner.data.eval_transform import EvalTransform
from ssl_runner.data.resize import resize
from ssl_runner.device import choose_device
from ssl_runner.errors import UsageError, one_line
from ssl_runner.numerics import usual_defaults
from ssl_runner.runs import filenames, weights
from ssl_runner.runs.other_backbone import WITHOUT_WEIGHTS
from ssl_runner.views import normalize, to_unit


@dataclass(frozen=True, eq=False)
class Transform:
    """Preprocessing of one image, as in the probes of the run.

    image_size   side of the output S, in pixels
    channels     3 (RGB) or 1 (luminance); any number for a data set with other channels
    mean, std    (C,) per-channel statistics, with pixels in [0, 1]
    stored_size  side of the images of the run before its evaluation transform, None for S
    evaluation   the evaluation transform, applied to images of stored_size x stored_size pixels
    tensor_resize  whether images are resized by `data.resize.resize`, as those of the run were, or by Pillow
    """

    image_size: int
    channels: int
    mean: Tensor
    std: Tensor
    stored_size: int | None = None
    evaluation: EvalTransform = field(default_factory=EvalTransform)
    tensor_resize: bool = False

    @usual_defaults()
    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """Return an image as a normalised float32 tensor (C, S, S) on the CPU.

        `image` is a PIL image of any mode, a uint8 array (H, W) or (H, W, channels), or a uint8 tensor
        (H, W) or (channels, H, W). An image of another size than that of the stored images is centre-cropped
        to a square and resized with a bicubic filter. The evaluation transform follows. Grayscale becomes
        RGB, and RGB becomes luminance, where the network needs it.

        Raises UsageError for another type or shape.
        """
        side = self.stored_size or self.image_size
        ready = (self.channels, side, side)
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape == ready:
            pixels = image.cpu()
        else:
            pixels = self._decode(_to_pil(image), side)
        return normalize(to_unit(self.evaluation(pixels[None])), self.mean, self.std)[0]

    def _decode(self, image: Image.Image, side: int) -> Tensor:
        """PIL image -> uint8 tensor (C, side, side)."""
        if self.channels not in (1, 3):
            raise UsageError(
                f"image: expected a uint8 tensor ({self.channels}, {side}, {side});"
                " resize it and stack its channels first"
            )
        try:
            if self.tensor_resize:
                whole = torch.tensor(decode.pixels(image, None, self.channels)).contiguous()
                return resize(whole[None], side)[0]
            return torch.tensor(decode.pixels(image, side, self.channels))
        except ValueError as error:
            raise UsageError(f"image: {one_line(error)}") from error


def _to_pil(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Convert a uint8 array (H, W[, channels]) or tensor ([channels, ]H, W), with 1, 3 or 4 channels."""
    if isinstance(image, Image.Image):
        return image
    array: Any = image
    if isinstance(image, Tensor) and image.ndim == 3:
        array = image.cpu().movedim(0, -1).numpy()
    elif isinstance(image, Tensor) and image.ndim == 2:
        array = image.cpu().numpy()
    if isinstance(array, np.ndarray) and array.dtype == np.uint8:
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
            return Image.fromarray(np.ascontiguousarray(array))
    given = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    raise UsageError(
        f"image={given}: expected a PIL image, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (C, H, W)"
        "; convert one image at a time"
    )


class Pretrained(nn.Module):
    """A trained backbone, optionally followed by its projector.

    `settings` is the header of the weights: `backbone` and `projector` hold the options of the networks.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module | None, settings: dict[str, Any]):
        super().__init__()
        self.backbone, self.projector, self.settings = backbone, projector, settings
        self.image_size: int = settings["image_size"]
        self.channels: int = settings["channels"]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> features (N, width), or embeddings (N, K) with a projector."""
        features = self.backbone(x).flatten(1)
        return features if self.projector is None else self.projector(features)


@usual_defaults()
def load(
    path: str | Path, device: str | torch.device = "cpu", with_projector: bool = False
) -> tuple[Pretrained, Transform]:
    """Load the network that a run trained. Returns (model, transform).

    path            run folder, or its backbone.safetensors
    device          device of the model
    with_projector  True: the model returns embeddings (N, K) instead of features (N, width); this reads
                    projector.safetensors from the same folder

    The model is in eval mode: images (N, C, H, W) -> features (N, width). `transform` converts one image to a
    normalised tensor (C, S, S). The random state is not changed. The header of the file names the function
    that builds the network, so load only files that you trust.

    Raises UsageError if there is no such file, if ssl_runner did not write it, or if its network cannot be
    rebuilt.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= filenames.BACKBONE
    if file.name == filenames.PROJECTOR:
        raise UsageError(
            f"path={file}: expected the folder of a run or its {filenames.BACKBONE}; with_projector=True adds"
            " the projector"
        )
    settings = _settings(file)
    projector = None
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
        node = settings["backbone"]
        shape = {"channels": settings["channels"], "image_size": settings["image_size"]}
        backbone = _rebuild(file, "backbone", node | WITHOUT_WEIGHTS.get(node["_target_"], {}) | shape)
        if with_projector:
            projector = _projector(file, settings, backbone)
    _load_weights(backbone, file)
    model = Pretrained(backbone, projector, settings).to(choose_device(str(device))).eval()
    mean, std = (torch.tensor(settings[name]) for name in ("mean", "std"))
    evaluation = EvalTransform(settings.get("eval_resize"), settings.get("eval_crop"))  # not in older files
    stored = {name: settings[name] for name in ("stored_size", "tensor_resize") if name in settings}
    return model, Transform(model.image_size, model.channels, mean, std, evaluation=evaluation, **stored)


def _settings(file: Path) -> dict[str, Any]:
    """Return the header of a file of weights. Raises UsageError if ssl_runner did not write it."""
    if not file.is_file():
        raise UsageError(
            f"path={file}: expected an existing file; give the folder or the {filenames.BACKBONE} of a"
            " finished run"
        )
    try:
        settings = weights.read_header(file)
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(
            f"path={file}: expected a safetensors file ({one_line(error)}); give the"
            f" {filenames.BACKBONE} of a finished run"
        ) from error
    if settings is None or "backbone" not in settings:
        raise UsageError(
            f"path={file}: expected weights written by ssl_runner, found no such header; load other weights"
            " with the library that wrote them"
        )
    return settings


def _projector(file: Path, settings: dict[str, Any], backbone: nn.Module) -> nn.Module:
    """Rebuild the projector and load its weights. The embeddings of an identity are the features."""
    if "projector" not in settings:
        raise UsageError(
            f"path={file}: expected a run that exported its projector, found one of an earlier version;"
            " leave out with_projector"
        )
    if settings["projector"] is None:
        return nn.Identity()
    node = settings["projector"] | {"features": backbone.width}
    projector = _rebuild(file, "projector", node)
    if projector.state_dict():
        weights_file = file.with_name(filenames.PROJECTOR)
        _settings(weights_file)
        _load_weights(projector, weights_file)
    return projector


def _rebuild(file: Path, part: str, node: dict[str, Any]) -> nn.Module:
    """Call the `_target_` of a network with its settings."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        reason = one_line(error.__cause__ or error)
        raise UsageError(
            f"path={file}: cannot rebuild the {part} {node['_target_']} ({reason})"
            "; make its module importable, in the version that trained it"
        ) from error


def _load_weights(module: nn.Module, file: Path) -> None:
    try:
        weights.load_exported(module, file)
    except RuntimeError as error:
        raise UsageError(
            f"path={file}: expected the tensors of its own header ({one_line(error)[:200]}); use the version"
            " of ssl_runner and of the model's library that wrote the file"
        ) from error
