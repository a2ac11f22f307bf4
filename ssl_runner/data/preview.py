"""views.png: a few images and their views."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont

from ssl_runner.batch import per_size
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.views import to_unit

FONT_SIZE, MARGIN = 13, 4  # pixels


def preview(loader: MultiViewLoader, path: Path, title: str, images: int = 8) -> None:
    """Write a picture with one row per image, for a few pretraining images: the image, then V views of it.

    Above are the title, and the number and the policy of each view. Views that are smaller than others have a
    white border.
    """
    data, positions = loader.data, loader.order(0)[:images]
    [(pixels, _)] = data.pretrain.batches(positions, len(positions), loader.device)
    X, _ = loader.fixed_batch(data.pretrain, positions)
    views = [(x * data.std[:, None, None] + data.mean[:, None, None]).cpu() for x in per_size(X)]
    originals = to_unit(pixels).cpu()  # MPS lacks antialiased interpolation in some versions
    size = max(x.shape[2:] for x in views)
    if originals.shape[2:] != size:
        originals = F.interpolate(originals, size, mode="bilinear", antialias=True)
    centred = [torchvision.transforms.functional.center_crop(1 - x, list(size)) for x in views]  # pads with 0
    rows = torch.cat([originals, *(1 - x for x in centred)]).unflatten(0, (loader.V + 1, -1)).transpose(0, 1)
    rows = F.interpolate(rows.flatten(0, 1), scale_factor=max(1, round(96 / max(size))), mode="nearest")
    grid = torchvision.utils.make_grid(rows.clamp(0, 1), loader.V + 1, pad_value=1.0)
    sheet = (255 * grid).round().byte().permute(1, 2, 0).numpy()
    policies = loader.augment.policies_of_views(loader.V)
    heads = ["original", *(f"view {v}\n{policy}".strip() for v, policy in enumerate(policies, 1))]
    with_heads(sheet, title, heads).save(path)


def with_heads(sheet: np.ndarray, title: str, heads: list[str]) -> Image.Image:
    """Add a title and the heads of the columns above a sheet (H, W, 3) uint8 of columns of equal width."""
    font = ImageFont.load_default(FONT_SIZE)
    width, lines = sheet.shape[1] // len(heads), 1 + max(head.count("\n") + 1 for head in heads)
    line = FONT_SIZE + MARGIN
    picture = Image.new("RGB", (sheet.shape[1], lines * line + 3 * MARGIN + sheet.shape[0]), "white")
    picture.paste(Image.fromarray(sheet), (0, picture.height - sheet.shape[0]))
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), shorten(title, font, sheet.shape[1] - MARGIN), "black", font)
    for column, head in enumerate(heads):
        for number, text in enumerate(head.split("\n"), 1):
            middle, top = (column + 0.5) * width, 2 * MARGIN + number * line
            draw.text((middle, top), shorten(text, font, width - MARGIN), "black", font, "ma")
    return picture


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, with an ellipsis if it is wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
