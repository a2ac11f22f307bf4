"""Each operation agrees with torchvision's on one image; properties of whole views and of policies."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch._inductor import metrics
from torch.testing import assert_close

from ssl_runner.config.compose import CONF
from ssl_runner.views import IMAGE_FORMAT, Augment, Policy, ViewFormat, color, geometry
from ssl_runner.views.augment import augment_rows_cpu, views_from_uniforms
from ssl_runner.views.sampler import MAX_DRAWS, ParamSampler, UniformSampler, ViewIndex
from tests.device import OnDevice, pretended
from tests.helpers import TINY, run_folder

B = 12
FULL = {
    "crop": {"scale": [0.2, 1.0]},
    "flip": 0.5,
    "jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "grayscale": 0.2,
    "blur": {"p": 0.5, "sigma": [0.1, 2.0]},
    "solarize": {"p": 0.2, "threshold": 0.5},
}


def sampler(rows: int = B, seed: int = 0) -> ParamSampler:
    return ParamSampler(rows, torch.device("cpu"), torch.Generator().manual_seed(seed))


def uniform_sampler(rows: int = B, seed: int = 0) -> ParamSampler:
    """The sampler of devices other than a CPU."""
    return UniformSampler(torch.rand(rows, MAX_DRAWS, generator=torch.Generator().manual_seed(seed)))


SAMPLERS = [sampler, uniform_sampler]


def random_images(channels: int = 3, size: tuple[int, int] = (20, 24)) -> Tensor:
    return torch.rand(B, channels, *size)


def one_by_one(operation, x: Tensor, *parameters: Tensor) -> Tensor:
    return torch.stack([operation(image, *(p[i].tolist() for p in parameters)) for i, image in enumerate(x)])


def column(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * column(factor)).clamp(0, 1)


def luma(x: Tensor) -> Tensor:
    return color.luma(x.unbind(1))[:, None]


def blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """The blend of `color.color_jitter`: factor x + (1 - factor) reference, clamped to [0, 1]."""
    return torch.lerp(reference, x, column(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    return torch.stack(color.mix_channels(x.unbind(1), color.hue_weights(turns)), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_match_torchvision(channels: int) -> None:
    x, factor = random_images(channels), sampler().uniform(0, 2)
    assert_close(adjust_brightness(x, factor), one_by_one(TF.adjust_brightness, x, factor))
    assert_close(adjust_contrast(x, factor), one_by_one(TF.adjust_contrast, x, factor))


def test_saturation_hue_and_grayscale_match_torchvision() -> None:
    x, factor, turns = random_images(), sampler().uniform(0, 2), sampler().uniform(-0.5, 0.5)
    x[0], x[1, 0] = 0.3, x[1, 1]  # a gray image, and one with two equal channels
    assert_close(adjust_saturation(x, factor), one_by_one(TF.adjust_saturation, x, factor))
    assert_close(adjust_hue(x, turns), one_by_one(TF.adjust_hue, x, turns), atol=1e-5, rtol=0)
    assert_close(luma(x), TF.rgb_to_grayscale(x))


def test_solarize_matches_torchvision() -> None:
    x = random_images()
    assert_close(color.solarize(x, 0.4), TF.solarize(x, 0.4))


@pytest.mark.parametrize("kernel", [3, 9])
def test_blur_matches_torchvision(kernel: int) -> None:
    x, sigma = random_images(), sampler().uniform(0.1, 2)
    assert_close(
        geometry.gaussian_blur(x, sigma, kernel),
        one_by_one(lambda i, s: TF.gaussian_blur(i, kernel, s), x, sigma),
    )


@pytest.mark.parametrize("size", [(20, 24), (32, 32), (7, 5)])
def test_resized_crop_and_flip_match_torchvision(size: tuple[int, int]) -> None:
    x, flip = random_images(size=size), sampler(seed=1).coin(0.5)
    boxes = geometry.random_boxes(sampler(), *size, scale=(0.08, 1.0))
    expected = one_by_one(
        lambda image, box: TF.resized_crop(image, *map(int, box), size, antialias=True), x, boxes
    )
    expected[flip] = expected[flip].flip(-1)
    assert_close(geometry.resample(x, boxes, flip), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image_size", "size"),
    [((20, 24), (20, 24)), ((20, 24), (9, 8)), ((32, 32), (16, 16)), ((12, 12), (17, 30))],
)
def test_crop_to_other_size_matches_torchvision_with_antialias(
    image_size: tuple[int, int], size: tuple[int, int]
) -> None:
    """The boxes include larger and smaller ones than the output."""
    x, flip = random_images(size=image_size), sampler(seed=1).coin(0.5)
    boxes = geometry.random_boxes(sampler(), *image_size, scale=(0.02, 1.0))
    expected = one_by_one(
        lambda image, box: TF.resized_crop(image, *map(int, box), size, antialias=True), x, boxes
    )
    expected[flip] = expected[flip].flip(-1)
    assert_close(geometry.resample(x, boxes, flip, size=size), expected, atol=1e-5, rtol=0)
    whole = TF.resize(x, list(size), antialias=True)
    assert_close(geometry.resample(x, size=size), whole, atol=1e-5, rtol=0)


def test_affine_matches_torchvision() -> None:
    x, d = random_images(), sampler()
    angle, scale, shear = d.uniform(-60, 60), d.uniform(0.6, 1.5), d.uniform(-25, 25)
    right, down = d.uniform(-6, 6).round(), d.uniform(-6, 6).round()
    expected = one_by_one(
        lambda image, a, r, o, s, h: TF.affine(image, a, [r, o], s, [h, 0.0], TF.InterpolationMode.BILINEAR),
        x, angle, right, down, scale, shear,
    )  # fmt: skip
    assert_close(
        geometry.resample(x, matrices=geometry.affine_matrices(angle, right, down, scale, shear)),
        expected,
        atol=2e-5,
        rtol=0,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_random_boxes_have_distribution_of_torchvision(sampler: Callable[..., ParamSampler]) -> None:
    """Compare mean, standard deviation and minimum of 20,000 boxes with RandomResizedCrop.get_params."""
    n, scale, ratio = 20_000, (0.08, 1.0), (3 / 4, 4 / 3)
    ours = geometry.random_boxes(sampler(n), 32, 32, scale, ratio)
    image = torch.empty(3, 32, 32)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, list(scale), list(ratio)) for _ in range(n)], dtype=torch.float)
    assert_close(ours.mean(0), theirs.mean(0), atol=0.2, rtol=0)
    assert_close(ours.std(0), theirs.std(0), atol=0.2, rtol=0)
    assert_close(ours.amin(0), theirs.amin(0), atol=1, rtol=0)
    top, left, h, w = ours.unbind(1)
    assert ((top >= 0) & (left >= 0) & (top + h <= 32) & (left + w <= 32)).all()


def test_jitter_applies_operations_in_all_orders() -> None:
    """Every row equals the four operations in one of their 24 orders, and all 24 orders occur.

    The operations are compared with torchvision's above.
    """
    rows = 400
    x = torch.rand(rows, 3, 6, 6)
    d = sampler(rows)
    brightness, contrast, saturation = (d.uniform(0.4, 1.6) for _ in range(3))
    hue, order, hue_position = d.uniform(-0.2, 0.2), d.random(3).argsort(1), d.choice(4)
    blends = color.blend_weights([brightness, contrast, saturation], order)
    ours = torch.stack(color.color_jitter(x.unbind(1), blends, color.hue_weights(hue), hue_position), 1)
    functions = [
        (adjust_brightness, brightness), (adjust_contrast, contrast),
        (adjust_saturation, saturation), (adjust_hue, hue),
    ]  # fmt: skip
    matched = torch.zeros(rows, dtype=torch.bool)
    orders = 0
    for order in itertools.permutations(functions):
        y = x
        for function, parameter in order:
            y = function(y, parameter)
        same = (y - ours).flatten(1).abs().amax(1) < 1e-5
        orders += bool(same.any())
        matched |= same
    assert matched.all()
    assert orders == 24


def test_hue_matches_torchvision_for_all_shifts() -> None:
    """The colours include corners, edges and grays of the colour cube, the shifts thirds of the circle."""
    colors = torch.cartesian_prod(*3 * [torch.tensor([0.0, 0.2, 0.5, 1.0])]).T.view(3, 8, 8)
    turns = torch.linspace(-0.5, 0.5, 61)
    x = colors.expand(61, -1, -1, -1)
    assert_close(adjust_hue(x, turns), one_by_one(TF.adjust_hue, x, turns), atol=1e-5, rtol=0)


def test_jitter_leaves_unselected_rows_unchanged() -> None:
    images = torch.randint(0, 256, (1000, 3, 2, 2), dtype=torch.uint8)
    settings = {"p": 0.3, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    same = (augment({"jitter": settings}, images, 1) - images / 255).flatten(1).abs().amax(1) < 1e-5
    assert 0.65 < same.float().mean() < 0.75


def augment(settings: dict, images: Tensor, V: int, seed: int = 0) -> Tensor:
    C = images.shape[1]
    return Augment({"all": settings})(
        images, V, torch.zeros(C), torch.ones(C), torch.Generator().manual_seed(seed)
    )


def test_empty_policy_returns_images_view_major() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert_close(augment({}, images, 3), (images.float() / 255).repeat(3, 1, 1, 1))


def test_normalisation_is_the_last_operation() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    X = Augment({"all": FULL})(images, 2, mean, std, torch.Generator().manual_seed(0))
    plain = augment(FULL, images, 2)
    assert_close(X, (plain - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_between_0_and_1(channels: int) -> None:
    images = torch.randint(0, 256, (64, channels, 16, 16), dtype=torch.uint8)
    X = augment({**FULL, "affine": {"degrees": 20, "shear": 10}}, images, 2)
    assert X.shape == (128, channels, 16, 16)
    assert X.min() >= 0
    assert X.max() <= 1


@pytest.mark.parametrize("operation", [*FULL, "affine"])
def test_operation_draws_parameters_per_row(operation: str) -> None:
    """All rows are the same image, so views that share their parameters would be equal."""
    affine = {"degrees": 30, "translate": 0.1, "scale": [0.8, 1.2], "shear": 10}
    settings = {**FULL, "affine": affine}[operation]
    settings = 0.5 if isinstance(settings, float) else settings | ({"p": 0.5} if "p" in settings else {})
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(200, -1, -1, -1)
    X = augment({operation: settings}, images, 2)
    distinct = len(torch.unique(X.flatten(1), dim=0))
    if operation in ("flip", "grayscale", "solarize"):
        assert distinct == 2
        # fair coins per row: half of the rows differ, and so do half of the pairs of views of an image
        outcome = (X[0] == X).flatten(1).all(1).float()
        assert 0.4 < outcome.mean() < 0.6
        assert 0.4 < (outcome[:200] != outcome[200:]).float().mean() < 0.6
    else:
        assert distinct > (150 if operation in ("blur", "jitter") else 350)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_choices_have_given_probabilities_and_are_independent(sampler: Callable[..., ParamSampler]) -> None:
    """Frequencies over 8,000 rows are within 4.5 standard deviations of the probabilities.

    Checked for single choices, pairs of choices, the two views of an image, adjacent rows, and every position
    of the hue.
    """
    n, p = 4000, {"jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.1}
    policy = Policy(**FULL | {"solarize": {"p": 0.1, "threshold": 0.5}})
    params = policy.sample_params(sampler(2 * n), (8, 8), (8, 8))
    hue_position = params["hue_position"]
    events = {name: params.get(name, hue_position < 4) for name in p}
    expected = [(events[a], p[a]) for a in p]
    expected += [(events[a] & events[b], p[a] * p[b]) for a in p for b in p if a < b]
    expected += [(events[a][:n] & events[a][n:], p[a] ** 2) for a in p]
    expected += [(events[a][1::2] & events[a][::2], p[a] ** 2) for a in p]
    expected += [(hue_position == k, p["jitter"] / 4) for k in range(4)]
    for event, q in expected:
        assert abs(event.float().mean() - q) < 4.5 * (q * (1 - q) / len(event)) ** 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_numbers_differ_between_rows(sampler: Callable[..., ParamSampler]) -> None:
    numbers = Policy(**FULL).sample_params(sampler(500), (32, 32), (32, 32))
    for name in ("boxes", "blends", "hues", "sigma"):
        assert len(torch.unique(numbers[name].reshape(500, -1), dim=0)) > 480, name


AFFINE = {"degrees": 15, "translate": 0.1, "scale": [0.85, 1.15], "shear": 10}


POLICIES = {
    "all but affine": FULL,
    "nothing": {},
    "flip": {"flip": 0.5},
    "affine": {"affine": AFFINE},
    "all": {"affine": AFFINE} | FULL,
    "a wide blur": FULL | {"blur": {"p": 0.5, "sigma": [0.3, 2], "kernel": 7}},
    "brightness only": {"jitter": {"p": 0.8, "brightness": 0.4}},
    "a blur of one pixel": FULL | {"blur": {"p": 0.5, "sigma": [0.3, 2], "kernel": 1}},
    "tiny crops": FULL | {"crop": {"scale": [0.001, 0.1], "ratio": [0.2, 5]}},
}
SIZES = [  # (height, width) of the images, and of the views
    ((20, 24), (20, 24)), ((20, 24), (9, 8)), ((31, 17), (40, 27)), ((42, 21), (28, 14)),
    ((30, 36), (10, 12)), ((4, 5), (4, 5)), ((4, 4), (2, 2)), ((60, 40), (50, 44)),
]  # fmt: skip


@pytest.mark.parametrize(("image_size", "size"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
def test_rows_on_cpu_match_batched_operations(
    settings: dict, channels: int, size: tuple, image_size: tuple
) -> None:
    """The CPU kernels agree with the batched operations used on GPUs, here both run on a CPU."""
    rows = 70
    policy, images = Policy(**settings), torch.randint(0, 256, (9, channels, *image_size), dtype=torch.uint8)
    params = policy.sample_params(sampler(rows), image_size, size)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:channels], torch.tensor([0.5, 0.6, 0.7])[:channels]
    image, row = torch.randint(9, (rows,)), torch.randperm(rows)
    X = torch.full((rows, channels, *size), torch.nan)
    augment_rows_cpu(policy, params, ViewIndex(image, row, torch.arange(rows)), images, X, mean, std)
    batched = (policy(images[image], params, size) - column3(mean)) / column3(std)
    assert_close(X[row], batched, atol=2e-5, rtol=0)


def column3(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


@pytest.mark.parametrize("side", [28, 32, 64, 96, 224])
@pytest.mark.parametrize("name", ["simclr", "vicreg", "digits"])
def test_views_from_uniforms_match_cpu_kernels(name: str, side: int) -> None:
    """The views of other devices equal those of the CPU kernels row by row.

    The tolerance grows with the side because float32 coordinates of pixels do. The images are noise.
    """
    images, V, channels = random_bytes(2, side), 2, 3
    mean, std = torch.zeros(channels), torch.ones(channels)
    [policy] = shipped(name).policies
    uniforms = torch.rand(2 * V, MAX_DRAWS, generator=torch.Generator().manual_seed(side))
    ours = views_from_uniforms([policy], [[*range(V)]], images, mean, std, [uniforms], IMAGE_FORMAT)
    params = policy.sample_params(UniformSampler(uniforms), (side, side), (side, side))
    X, rows = torch.empty_like(ours), torch.arange(2 * V)
    augment_rows_cpu(policy, params, ViewIndex(rows % 2, rows, rows), images, X, mean, std)
    assert_close(ours, X, atol=3e-7 * side, rtol=0)


def test_policy_with_all_operations_takes_all_uniform_numbers() -> None:
    numbers = uniform_sampler()
    Policy(**FULL, affine=AFFINE).sample_params(numbers, (8, 8), (8, 8))
    assert numbers.taken == MAX_DRAWS


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policies", [{"all": FULL}, {"first": FULL, "second": {"affine": AFFINE}}], ids=len)
def test_views_on_device_do_not_sync_and_have_given_format(policies: dict, channels: int) -> None:
    """Each call differs from the one before; a shard has the views that it has in the whole batch."""
    augment, V = Augment(policies), 3
    form = ViewFormat(12, torch.bfloat16, torch.channels_last)
    images = torch.randint(0, 256, (8, channels, 16, 16), dtype=torch.uint8)
    mean, std = torch.zeros(channels), torch.ones(channels)

    def views(images: Tensor, *shard: int, calls: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        with pretended():
            on_device = [OnDevice(tensor) for tensor in (mean, std)]
            for _ in range(calls):
                X = augment(OnDevice(images), V, *on_device, generator, *(shard or (0, 1)), form)
        return X.values

    X = views(images)
    assert (X.shape, X.dtype) == ((V * 8, channels, 12, 12), torch.bfloat16)
    assert X.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(X, views(images))
    assert not torch.equal(X, views(images, calls=2))
    halves = [views(half, rank, 2).unflatten(0, (V, 4)) for rank, half in enumerate(images.chunk(2))]
    assert torch.equal(torch.cat(halves, 1), X.unflatten(0, (V, 8)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's own warnings
@pytest.mark.parametrize("name", ["simclr", "vicreg"])
def test_compiled_views_have_few_kernels_and_match_eager(name: str) -> None:
    """Inductor's number of kernels, on a CPU, with the sampling of the parameters; sort is not counted."""
    augment, images, mean, std = shipped(name), random_bytes(16, 32), torch.zeros(3), torch.ones(3)
    uniforms = [torch.rand(32, MAX_DRAWS, generator=torch.Generator().manual_seed(0))]
    torch.compiler.reset()
    metrics.reset()
    augment.compile()
    form = ViewFormat(None, torch.float32, torch.channels_last)
    arguments = (augment.policies, [[0, 1]], images, mean, std, uniforms, form)
    compiled, eager = (make(*arguments) for make in (augment.from_uniforms, views_from_uniforms))
    assert metrics.generated_kernel_count <= 20
    assert compiled.is_contiguous(memory_format=torch.channels_last)
    assert_close(compiled, eager, atol=1e-5, rtol=0)


def random_bytes(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


def shipped(name: str) -> Augment:
    """The policies of conf/views."""
    return instantiate(OmegaConf.load(CONF / "views" / f"{name}.yaml"), _convert_="all")


@pytest.mark.slow
def test_cpu_kernels_stay_within_array_bounds(tmp_path: Path) -> None:
    """Rerun `test_rows_on_cpu_match_batched_operations` with the bounds checks of numba."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    test = f"{__file__}::test_rows_on_cpu_match_batched_operations"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=environment,
        capture_output=True,
    )
    assert process.returncode == 0, process.stdout.decode()


def test_blur_kernel_of_twice_the_view_raises_value_error() -> None:
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    policy = {"blur": {"p": 1, "sigma": [0.1, 2], "kernel": 55}}
    assert augment(policy, images, 1).isfinite().all()
    policy["blur"]["kernel"] = 57
    with pytest.raises(ValueError, match="kernel=57: expected at most 55 for views of 28 x 28"):
        augment(policy, images, 1)


FORK = """
import os, sys
import ssl_runner.views
assert "numba" not in sys.modules
from ssl_runner.views.cpu_kernels import thread_pool

thread_pool(2).submit(int).result()
child = os.fork()
thread_pool(2).submit(int).result(10)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_views_import_without_numba_and_forked_process_creates_its_own_threads() -> None:
    """The threads of the parent do not exist after a fork, so using their pool would block forever."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60, cwd=Path(__file__).parents[1])


def test_views_do_not_depend_on_number_of_threads() -> None:
    images, threads = torch.randint(0, 256, (150, 3, 16, 16), dtype=torch.uint8), torch.get_num_threads()
    made = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            made.append(augment(FULL, images, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize(
    "settings", [FULL, {}, {"flip": 0.5}, {"affine": AFFINE}, {"affine": AFFINE} | FULL], ids=str
)
def test_views_of_other_size_match_resized_views(settings: dict, size: int) -> None:
    """For smooth images and equal parameters, resizing before or after augmentation hardly differs."""
    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).byte()
    smooth = {name: value for name, value in settings.items() if name != "solarize"}
    policy, mean, std = Augment({"all": smooth}), torch.zeros(3), torch.ones(3)
    small = policy(images, 2, mean, std, torch.Generator().manual_seed(3), view_format=ViewFormat(size))
    large = policy(images, 2, mean, std, torch.Generator().manual_seed(3))
    assert small.shape == (12, 3, size, size)
    assert (small - TF.resize(large, [size, size], antialias=True)).abs().mean() < 0.03


def test_size_without_crop_matches_torchvision_resize() -> None:
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    X = Augment({"all": {}})(
        images, 2, torch.zeros(3), torch.ones(3), torch.Generator(), view_format=ViewFormat(12)
    )
    assert_close(X, TF.resize(images / 255, [12, 12], antialias=True).repeat(2, 1, 1, 1), atol=1e-5, rtol=0)


def test_views_depend_only_on_generator() -> None:
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    first = augment(FULL, images, 2, seed=1)
    torch.rand(5)
    assert torch.equal(first, augment(FULL, images, 2, seed=1))
    assert not torch.equal(first, augment(FULL, images, 2, seed=2))


@pytest.mark.parametrize("V", [2, 3, 5])
def test_policies_alternate_over_views(V: int) -> None:
    """View v uses policy v mod 2. The first policy leaves the image unchanged, the second inverts it."""
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    both = Augment({"first": {}, "second": {"solarize": {"p": 1.0, "threshold": 0.0}}})
    X = both(images, V, torch.zeros(3), torch.ones(3), torch.Generator()).unflatten(0, (V, 4))
    plain = images.float() / 255
    for v in range(V):
        assert_close(X[v], 1 - plain if v % 2 else plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "flip=1.5: expected a number from 0 to 1"),
        ({"flip": "often"}, "flip=often: expected a number from 0 to 1"),
        ({"grayscale": -0.1}, "grayscale=-0.1: expected a number from 0 to 1"),
        ({"crop": {"scale": [0.0, 1.0]}}, "crop.scale=[0.0, 1.0]: expected a pair [low, high]"),
        ({"crop": {"scale": [0.5, 0.2]}}, "crop.scale=[0.5, 0.2]: expected a pair [low, high]"),
        ({"crop": {"scale": [0.5, 1.2]}}, "crop.scale=[0.5, 1.2]: expected a pair [low, high]"),
        ({"crop": {"scale": 0.5}}, "crop.scale=0.5: expected a pair [low, high]"),
        ({"crop": {}}, "crop={}: expected a mapping with keys scale, ratio; include scale"),
        ({"crop": 0.5}, "crop=0.5: expected a mapping with keys scale, ratio; include scale"),
        ({"affine": {"scale": [0, 1]}}, "affine.scale=[0, 1]: expected a pair [low, high]"),
        ({"affine": {"turn": 10}}, "affine={'turn': 10}: expected a mapping with keys degrees, "),
        ({"jitter": {"p": 0.8, "hue": 0.7}}, "jitter.hue=0.7: expected a number from 0 to 0.5"),
        ({"blur": {"p": 0.5, "sigma": [0, 1]}}, "blur.sigma=[0, 1]: expected a pair [low, high]"),
        ({"blur": {"p": 0.5, "sigma": [0.1, 1], "kernel": 4}}, "blur.kernel=4: expected an odd number"),
        ({"blur": {"p": 0.5, "sigma": [0.1, 1], "kernel": 0}}, "blur.kernel=0: expected an integer >= 1"),
        ({"solarize": {"p": 2, "threshold": 0.5}}, "solarize.p=2: expected a number from 0 to 1"),
    ],
    ids=str,
)
def test_invalid_policy_raises_value_error(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"views.policies.all.{message}")):
        Augment({"all": settings})


def test_unknown_operation_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"views\.policies\.all: .*unexpected keyword argument 'mirror'"):
        Augment({"all": {"mirror": 0.5}})


def test_preview_writes_grid_of_images_and_views(ssl_run, tmp_path: Path) -> None:
    code, out, err = ssl_run(f"{TINY} V=3 views.preview=true epochs=1")
    assert (code, err) == (0, "")
    with Image.open(run_folder(out) / "views.png") as picture:
        assert picture.width == 4 * (28 * 3 + 2) + 2
        assert len(picture.getcolors(2**24)) > 100


NO_NUMBA = {  # sources of a module `numba` whose import fails, and the reason that is printed
    "raise ModuleNotFoundError(\"No module named 'numba'\")": "No module named 'numba'",
    "raise ImportError('Numba needs NumPy 2.4\\nor less')": "Numba needs NumPy 2.4 or less",
    "import numpy; numpy.no_such_name": "module 'numpy' has no attribute 'no_such_name'",
    "raise OSError('Could not load libllvmlite.so')": "Could not load libllvmlite.so",
}
WITHOUT_NUMBA = """
import json, os, sys
import torch
from ssl_runner.views import Augment

images, augment = torch.load("images.pt"), Augment({"all": json.loads(sys.argv[1])})
for case in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        sys.path.insert(0, case)
        for _ in range(2):
            X = augment(images, 2, torch.zeros(3), torch.ones(3), torch.Generator().manual_seed(1))
        torch.save(X, f"{case}.pt")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_views_match_and_print_one_line_if_numba_import_fails(tmp_path: Path) -> None:
    """In one subprocess, whose forks import the modules of NO_NUMBA."""
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    for case, source in enumerate(NO_NUMBA):
        (tmp_path / str(case)).mkdir()
        (tmp_path / str(case) / "numba.py").write_text(source)
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA, json.dumps(FULL), *map(str, range(len(NO_NUMBA)))],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stderr.splitlines() == [
        f"numba cannot be used ({reason}): views are computed several times slower"
        for reason in NO_NUMBA.values()
    ]
    expected = augment(FULL, images, 2, seed=1)
    for case in range(len(NO_NUMBA)):
        assert_close(torch.load(tmp_path / f"{case}.pt"), expected, atol=2e-5, rtol=0)
