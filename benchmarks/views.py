"""Random views from uint8 images to normalised float32: ssl_runner, torchvision on PIL images, kornia."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from benchmarks import measure
from ssl_runner.batch import per_size
from ssl_runner.config.compose import CONF
from ssl_runner.views import Augment
from ssl_runner.views.policy import odd

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
# n (even) -> n views (n, 3, size, size): two views of each of n / 2 images
Make = Callable[[int], Tensor]


def run(device: torch.device, full: bool, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per policy, size and tool: work, tool, views_per_s, ratio, peak_mib.

    `peak_mib` is the memory for one batch of views, including the batch itself.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            sizes = (32, 64, 96, 224) if full else (32, 96)
            return [
                row
                for name in ("simclr", "vicreg")
                for size in sizes
                for row in compare(name, size, device, full)
            ]
    finally:
        torch.set_num_threads(threads)


def compare(name: str, size: int, device: torch.device, full: bool) -> list[dict[str, Any]]:
    """Rows of one policy and image size. Raises AssertionError if ours and torchvision's views differ."""
    policies: Any = OmegaConf.to_container(OmegaConf.load(CONF / "views" / f"{name}.yaml").policies)
    settings = policies["all"]
    batch = 512 * (8 if device.type == "cuda" else 1)  # on the CPU two views of 256 images, as in a step
    images = fields(batch // 2, size)
    tools = {
        "ours": ours(settings, images.to(device)),
        "torchvision on PIL": torchvision_on_pil(settings, images, device),
        "kornia": in_kornia(settings, images.to(device)),
    }
    peak = {tool: measure.peak_memory(partial(make, batch), device) for tool, make in tools.items()}
    agree(tools["ours"], tools["torchvision on PIL"], batch)
    # fractions of a batch, so that all tools take about the same time per turn
    part = {"ours": 1, "torchvision on PIL": 16, "kornia": 4 if device.type == "cpu" else 1}
    counts = {tool: max(4, batch // part[tool]) for tool in tools}
    work: dict[str, measure.Work] = {tool: partial(make, counts[tool]) for tool, make in tools.items()}
    times = measure.interleaved(work, device, budget=20.0 if full else 8.0)
    each = {tool: taken / counts[tool] for tool, taken in times.items()}
    ratio = measure.versus(each)
    return [
        {
            "work": f"{name} {size} px",
            "tool": tool,
            "views_per_s": 1 / each[tool],
            "ratio": ratio[tool],
            "peak_mib": peak[tool],
        }
        for tool in tools
    ]


def fields(n: int, size: int) -> Tensor:
    """Seeded smooth images with a little noise, like natural ones: (n, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), size=size, mode="bicubic")
    noise = torch.randn(n, 3, size, size, generator=generator)
    return ((smooth + 0.05 * noise).clamp(0, 1) * 255).byte()


def kernel(size: int) -> int:
    """Default side of the blur kernel in ssl_runner."""
    return max(3, odd(size / 10))


def strengths(jitter: Mapping[str, float]) -> tuple[float, float, float, float]:
    """Brightness, contrast, saturation and hue, in the order of ColorJitter's arguments."""
    return jitter["brightness"], jitter["contrast"], jitter["saturation"], jitter["hue"]


def ours(settings: Mapping[str, Any], images: Tensor) -> Make:
    """Views by `ssl_runner.views.Augment`."""
    augment, generator = Augment({"all": settings}), torch.Generator(images.device).manual_seed(0)
    mean, std = (torch.tensor(numbers, device=images.device) for numbers in (MEAN, STD))
    return lambda views: per_size(augment(images[: views // 2], 2, mean, std, generator))[0]


def torchvision_on_pil(settings: Mapping[str, Any], images: Tensor, device: torch.device) -> Make:
    """Views by torchvision's transforms, one PIL image at a time."""
    size, jitter = images.shape[-1], settings["jitter"]
    steps = [
        T.RandomResizedCrop(size, scale=settings["crop"]["scale"]),
        T.RandomHorizontalFlip(settings["flip"]),
        T.RandomApply([T.ColorJitter(*strengths(jitter))], p=jitter["p"]),
        T.RandomGrayscale(settings["grayscale"]),
    ]
    if blur := settings.get("blur"):
        steps.append(T.RandomApply([T.GaussianBlur(kernel(size), blur["sigma"])], p=blur["p"]))
    if solarize := settings.get("solarize"):
        steps.append(T.RandomSolarize(round(255 * solarize["threshold"]), solarize["p"]))
    transform = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return lambda views: torch.stack([transform(image) for image in 2 * pil_images[: views // 2]]).to(device)


def in_kornia(settings: Mapping[str, Any], images: Tensor) -> Make:
    """Views by kornia, in batches."""
    import kornia.augmentation as K

    size, jitter = images.shape[-1], settings["jitter"]
    steps = [
        K.RandomResizedCrop((size, size), scale=settings["crop"]["scale"]),
        K.RandomHorizontalFlip(p=settings["flip"]),
        K.ColorJitter(*strengths(jitter), p=jitter["p"]),
        K.RandomGrayscale(p=settings["grayscale"]),
    ]
    if blur := settings.get("blur"):
        steps.append(K.RandomGaussianBlur(kernel(size), tuple(blur["sigma"]), p=blur["p"]))
    if solarize := settings.get("solarize"):
        steps.append(K.RandomSolarize((solarize["threshold"],) * 2, (0.0, 0.0), p=solarize["p"]))
    transform = nn.Sequential(*steps, K.Normalize(MEAN, STD)).to(images.device)
    return lambda views: transform(images[: views // 2].repeat(2, 1, 1, 1).float() / 255)


def agree(one: Make, other: Make, batch: int) -> None:
    """Check that two tools produce views with the same statistics.

    Compares the mean and standard deviation of each channel, averaged over at least 256 views of the same
    images. The tolerance is 5 standard errors plus 0.02, because PIL rounds to integers. Raises
    AssertionError.
    """
    batches = -(-256 // batch)
    for what in ("mean", "std"):
        a, b = (
            torch.cat([getattr(make(batch), what)((2, 3)).cpu() for _ in range(batches)])
            for make in (one, other)
        )
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        if ((a.mean(0) - b.mean(0)).abs() > 5 * error + 0.02).any():
            raise AssertionError(
                f"{what} of the channels of a view: {a.mean(0).tolist()} versus {b.mean(0).tolist()}"
            )
