"""`dataset.size` and `dataset.channels`: compared with torchvision and Pillow, image by image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ssl_runner.data import image_folder, readers, resize
from ssl_runner.data.dataset import Source
from ssl_runner.pretrained import Transform
from ssl_runner.views import to_unit
from tests.helpers import load


def noise(n: int, channels: int, height: int, width: int) -> Source:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = (255 * (0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator))).to(torch.uint8)
    rows = np.arange(n)
    return Source(images, torch.arange(n) % 2, ["a", "b"], rows[4:], rows[:4], rows[:0])


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).squeeze().numpy())


@pytest.mark.parametrize(("height", "width"), [(96, 96), (32, 32), (40, 64), (64, 40)])
@pytest.mark.parametrize("size", [64, 28])
def test_resized_images_equal_resize_and_center_crop(
    height: int, width: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resize, "BLOCK", 3)  # the last of three blocks has one image
    data = noise(7, 3, height, width)
    images = resize.resized(data, size, None).images
    assert images.shape == (7, 3, size, size)
    bicubic = v2.InterpolationMode.BICUBIC
    reference = v2.Compose([v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size)])
    for image, original in zip(images, data.images, strict=True):
        assert torch.equal(image, reference(original))
        pil = torch.from_numpy(np.array(reference(to_pil(original)))).permute(2, 0, 1)
        difference = (image.int() - pil.int()).abs()  # Pillow rounds its weights to other fixed-point numbers
        assert difference.max() <= 2
        assert (difference <= 1).float().mean() > 0.999


@pytest.mark.parametrize("size", [None, 8, 12, 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_transform_of_load_equals_resized_images(size: int | None, channels: int) -> None:
    data = noise(5, 3, 12, 12)
    small = resize.resized(data, size, channels)
    assert small.tensor_resize == (size in (8, 20))
    mean, std = torch.zeros(channels), torch.ones(channels)
    transform = Transform(small.images.shape[2], channels, mean, std, tensor_resize=small.tensor_resize)
    for image, original in zip(small.images, data.images, strict=True):
        assert torch.equal(transform(to_pil(original)), to_unit(image))
        assert torch.equal(transform(original), to_unit(image))


def test_one_channel_equals_pillow_luma() -> None:
    data = noise(5, 3, 12, 12)
    grey = resize.resized(data, None, 1).images
    assert grey.shape == (5, 1, 12, 12)
    for image, original in zip(grey, data.images, strict=True):
        assert np.array_equal(image[0].numpy(), np.asarray(to_pil(original).convert("L")))


def test_three_channels_repeat_one() -> None:
    data = noise(5, 1, 12, 12)
    assert torch.equal(resize.resized(data, None, 3).images, data.images.repeat(1, 3, 1, 1))
    assert torch.equal(
        resize.resized(data, 8, 3).images, resize.resized(data, 8, None).images.repeat(1, 3, 1, 1)
    )


def test_published_size_and_channels_are_not_copied() -> None:
    data = noise(5, 3, 12, 12)
    for size, channels in ((None, None), (12, None), (None, 3), (12, 3)):
        assert resize.resized(data, size, channels) is data


def test_resized_data_set_keeps_labels_and_splits() -> None:
    data = noise(24, 3, 16, 16)
    small = resize.resized(data, 8, 1)
    assert (small.labels, small.classes) == (data.labels, data.classes)
    assert (small.train, small.test, small.unlabeled) == (data.train, data.test, data.unlabeled)
    splits = load(small)
    assert (splits.image_size, splits.channels, splits.mean.shape) == (8, 1, (1,))


def test_images_of_two_channels_raise_value_error() -> None:
    for channels in (1, 3):
        with pytest.raises(ValueError, match=f"dataset.channels={channels}: expected images of 1 or 3"):
            resize.resized(noise(5, 2, 8, 8), None, channels)


def test_mnist5k_takes_size_and_channels() -> None:
    published, large = readers.mnist5k(), readers.mnist5k(size=32, channels=3)
    assert large.images.shape == (5000, 3, 32, 32)
    assert torch.equal(large.labels, published.labels)
    assert np.array_equal(large.test, published.test)


def test_folder_takes_channels(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for image, name in zip(noise(2, 3, 12, 12).images, ("a", "b"), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(2):
            to_pil(image).save(root / name / f"{number}.png")
    grey, colour = (
        image_folder.folder(str(root), None, str(tmp_path / "cache"), channels=channels).images
        for channels in (1, None)
    )
    assert (grey.shape, colour.shape) == ((4, 1, 12, 12), (4, 3, 12, 12))
    assert torch.equal(grey, resize.luma(colour))
