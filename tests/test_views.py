"""Each operation against torchvision's on one image; then what a whole view must and must not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import color, geometry
from ssl_runner.draw import Draw
from ssl_runner.views import Augment, Policy, all_at_once, row_by_row

B = 12
FULL = {
    "crop": {"scale": [0.2, 1.0]},
    "flip": 0.5,
    "jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "grayscale": 0.2,
    "blur": {"p": 0.5, "sigma": [0.1, 2.0]},
    "solarize": {"p": 0.2, "threshold": 0.5},
}


def draw(rows: int = B, seed: int = 0) -> Draw:
    return Draw(rows, torch.device("cpu"), torch.Generator().manual_seed(seed))


def images(channels: int = 3, size: tuple[int, int] = (20, 24)) -> Tensor:
    return torch.rand(B, channels, *size)


def one_by_one(operation, x: Tensor, *parameters: Tensor) -> Tensor:
    return torch.stack([operation(image, *(p[i].tolist() for p in parameters)) for i, image in enumerate(x)])


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast(channels: int) -> None:
    x, factor = images(channels), draw().uniform(0, 2)
    assert_close(color.adjust_brightness(x, factor), one_by_one(TF.adjust_brightness, x, factor))
    assert_close(color.adjust_contrast(x, factor), one_by_one(TF.adjust_contrast, x, factor))


def test_saturation_hue_and_grayscale() -> None:
    x, factor, turns = images(), draw().uniform(0, 2), draw().uniform(-0.5, 0.5)
    x[0], x[1, 0] = 0.3, x[1, 1]  # a gray image, and one with two equal channels
    assert_close(color.adjust_saturation(x, factor), one_by_one(TF.adjust_saturation, x, factor))
    assert_close(color.adjust_hue(x, turns), one_by_one(TF.adjust_hue, x, turns), atol=1e-5, rtol=0)
    assert_close(color.luma(x), TF.rgb_to_grayscale(x))


def test_solarize() -> None:
    x = images()
    assert_close(color.solarize(x, 0.4), TF.solarize(x, 0.4))


@pytest.mark.parametrize("kernel", [3, 9])
def test_blur(kernel: int) -> None:
    x, sigma = images(), draw().uniform(0.1, 2)
    assert_close(
        geometry.gaussian_blur(x, sigma, kernel),
        one_by_one(lambda i, s: TF.gaussian_blur(i, kernel, s), x, sigma),
    )


@pytest.mark.parametrize("size", [(20, 24), (32, 32), (7, 5)])
def test_resized_crop_and_flip(size: tuple[int, int]) -> None:
    x, flip = images(size=size), draw(seed=1).coin(0.5)
    boxes = geometry.random_boxes(draw(), *size, scale=(0.08, 1.0))
    expected = one_by_one(
        lambda image, box: TF.resized_crop(image, *map(int, box), size, antialias=True), x, boxes
    )
    expected[flip] = expected[flip].flip(-1)
    assert_close(geometry.resample(x, boxes, flip), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("own", "size"), [((20, 24), (20, 24)), ((20, 24), (9, 8)), ((32, 32), (16, 16)), ((12, 12), (17, 30))]
)
def test_a_crop_to_any_size_is_torchvisions_with_antialias(
    own: tuple[int, int], size: tuple[int, int]
) -> None:
    """Boxes that shrink to the size, and boxes that grow."""
    x, flip = images(size=own), draw(seed=1).coin(0.5)
    boxes = geometry.random_boxes(draw(), *own, scale=(0.02, 1.0))
    expected = one_by_one(
        lambda image, box: TF.resized_crop(image, *map(int, box), size, antialias=True), x, boxes
    )
    expected[flip] = expected[flip].flip(-1)
    assert_close(geometry.resample(x, boxes, flip, size=size), expected, atol=1e-5, rtol=0)
    whole = TF.resize(x, list(size), antialias=True)
    assert_close(geometry.resample(x, size=size), whole, atol=1e-5, rtol=0)


def test_affine() -> None:
    x, d = images(), draw()
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


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    """Mean, deviation and extremes of 20,000 boxes beside as many of RandomResizedCrop.get_params."""
    import torchvision

    n, scale, ratio = 20_000, (0.08, 1.0), (3 / 4, 4 / 3)
    ours = geometry.random_boxes(draw(n), 32, 32, scale, ratio)
    image = torch.empty(3, 32, 32)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, list(scale), list(ratio)) for _ in range(n)], dtype=torch.float)
    assert_close(ours.mean(0), theirs.mean(0), atol=0.2, rtol=0)
    assert_close(ours.std(0), theirs.std(0), atol=0.2, rtol=0)
    assert_close(ours.amin(0), theirs.amin(0), atol=1, rtol=0)
    top, left, h, w = ours.unbind(1)
    assert ((top >= 0) & (left >= 0) & (top + h <= 32) & (left + w <= 32)).all()


def test_jitter_takes_every_order_and_each_agrees_with_torchvision() -> None:
    """Every row equals torchvision's four functions in one of their 24 orders, and over many rows all 24 occur."""
    import itertools

    rows = 400
    x = torch.rand(rows, 3, 6, 6)
    d = draw(rows)
    brightness, contrast, saturation = (d.uniform(0.4, 1.6) for _ in range(3))
    hue, order, place = d.uniform(-0.2, 0.2), d.random(3).argsort(1), d.choice(4).sort().values
    blends = color.blend_weights(torch.stack([brightness, contrast, saturation], 1), order)
    ours = color.color_jitter(x.clone(), blends, color.hue_weights(hue), place)
    functions = [
        (color.adjust_brightness, brightness), (color.adjust_contrast, contrast),
        (color.adjust_saturation, saturation), (color.adjust_hue, hue),
    ]  # fmt: skip
    taken = torch.zeros(rows, dtype=torch.bool)
    orders = 0
    for order in itertools.permutations(functions):
        y = x
        for function, parameter in order:
            y = function(y, parameter)
        same = (y - ours).flatten(1).abs().amax(1) < 1e-5
        orders += bool(same.any())
        taken |= same
    assert taken.all()
    assert orders == 24


def test_hue_all_around_the_circle() -> None:
    """The corners, edges and grays of the colour cube, at turns where the channels change places and between."""
    colors = torch.cartesian_prod(*3 * [torch.tensor([0.0, 0.2, 0.5, 1.0])]).T.view(3, 8, 8)
    turns = torch.linspace(-0.5, 0.5, 61)
    x = colors.expand(61, -1, -1, -1)
    assert_close(color.adjust_hue(x, turns), one_by_one(TF.adjust_hue, x, turns), atol=1e-5, rtol=0)


def test_jitter_leaves_the_rows_that_it_does_not_pick() -> None:
    originals = torch.randint(0, 256, (1000, 3, 2, 2), dtype=torch.uint8)
    settings = {"p": 0.3, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    same = (augment({"jitter": settings}, originals, 1) - originals / 255).flatten(1).abs().amax(1) < 1e-5
    assert 0.65 < same.float().mean() < 0.75


def augment(settings: dict, originals: Tensor, V: int, seed: int = 0) -> Tensor:
    C = originals.shape[1]
    return Augment({"all": settings})(
        originals, V, torch.zeros(C), torch.ones(C), torch.Generator().manual_seed(seed)
    )


def test_no_operation_is_the_image_itself_view_major() -> None:
    originals = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert_close(augment({}, originals, 3), (originals.float() / 255).repeat(3, 1, 1, 1))


def test_normalisation_comes_last() -> None:
    originals = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    X = Augment({"all": FULL})(originals, 2, mean, std, torch.Generator().manual_seed(0))
    plain = augment(FULL, originals, 2)
    assert_close(X, (plain - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("channels", [1, 3])
def test_views_stay_in_range(channels: int) -> None:
    originals = torch.randint(0, 256, (64, channels, 16, 16), dtype=torch.uint8)
    X = augment({**FULL, "affine": {"degrees": 20, "shear": 10}}, originals, 2)
    assert X.shape == (128, channels, 16, 16)
    assert X.min() >= 0
    assert X.max() <= 1


@pytest.mark.parametrize("operation", [*FULL, "affine"])
def test_every_row_has_its_own_randomness(operation: str) -> None:
    """The same image in every row: one draw for a batch, or for all views of an image, would make equal rows."""
    affine = {"degrees": 30, "translate": 0.1, "scale": [0.8, 1.2], "shear": 10}
    settings = {**FULL, "affine": affine}[operation]
    settings = 0.5 if isinstance(settings, float) else settings | ({"p": 0.5} if "p" in settings else {})
    originals = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(200, -1, -1, -1)
    X = augment({operation: settings}, originals, 2)
    distinct = len(torch.unique(X.flatten(1), dim=0))
    if operation in ("flip", "grayscale", "solarize"):
        assert distinct == 2
        outcome = (
            (X[0] == X).flatten(1).all(1).float()
        )  # a coin a row: even, and the two views of an image disagree half the time
        assert 0.4 < outcome.mean() < 0.6
        assert 0.4 < (outcome[:200] != outcome[200:]).float().mean() < 0.6
    else:
        assert distinct > (150 if operation in ("blur", "jitter") else 350)


def test_coins_fall_as_often_as_told_and_independently() -> None:
    """Of 8,000 rows each choice takes its share, within 4.5 deviations; so do both of two choices, of an image's two views, of
    neighbouring rows, and every place of the hue among those that are jittered."""
    n, p = 4000, {"jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.1}
    chosen = (
        Policy(**FULL | {"solarize": {"p": 0.1, "threshold": 0.5}}).draw(draw(2 * n), (8, 8), (8, 8)).choices
    )
    place = chosen.pop("place")
    falls = {"jitter": place < 4, **chosen}
    shares = [(falls[a], p[a]) for a in p]
    shares += [(falls[a] & falls[b], p[a] * p[b]) for a in p for b in p if a < b]
    shares += [(falls[a][:n] & falls[a][n:], p[a] ** 2) for a in p]
    shares += [(falls[a][1::2] & falls[a][::2], p[a] ** 2) for a in p]
    shares += [(place == k, p["jitter"] / 4) for k in range(4)]
    for fell, share in shares:
        assert abs(fell.float().mean() - share) < 4.5 * (share * (1 - share) / len(fell)) ** 0.5


def test_no_two_rows_share_any_number() -> None:
    numbers = Policy(**FULL).draw(draw(500), (32, 32), (32, 32)).numbers
    for name in ("boxes", "blends", "hues", "sigma"):
        assert len(torch.unique(numbers[name].reshape(500, -1), dim=0)) > 480, name


AFFINE = {"degrees": 15, "translate": 0.1, "scale": [0.85, 1.15], "shear": 10}


WAYS = {
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
SIZES = [  # the images' own, the views'
    ((20, 24), (20, 24)), ((20, 24), (9, 8)), ((31, 17), (40, 27)), ((42, 21), (28, 14)), ((30, 36), (10, 12)),
    ((4, 5), (4, 5)), ((4, 4), (2, 2)), ((60, 40), (50, 44)),
]  # fmt: skip


@pytest.mark.parametrize(("own", "size"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_row_by_row_and_all_at_once_make_the_same(
    settings: dict, channels: int, size: tuple, own: tuple
) -> None:
    """What a CPU does beside what a GPU does, run here, with the same random numbers."""
    rows = 70
    policy, images = Policy(**settings), torch.randint(0, 256, (9, channels, *own), dtype=torch.uint8)
    drawn = policy.draw(draw(rows), own, size)
    which, where = torch.randint(9, (rows,)), torch.randperm(rows)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:channels], torch.tensor([0.5, 0.6, 0.7])[:channels]
    made = [torch.full((rows, channels, *size), torch.nan) for _ in range(2)]
    for X, make in zip(made, (row_by_row, all_at_once), strict=True):
        make(policy, drawn, torch.arange(rows), images, which, X, where, mean, std)
    assert_close(made[0], made[1], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_no_row_reads_or_writes_beside_its_arrays(tmp_path: Path) -> None:
    """Compiled with numba's checks of every index."""
    checked = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    test = f"{__file__}::test_row_by_row_and_all_at_once_make_the_same"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=checked,
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stdout.decode()


def test_a_blur_that_reaches_over_the_view_is_refused() -> None:
    originals = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    policy = {"blur": {"p": 1, "sigma": [0.1, 2], "kernel": 55}}
    assert augment(policy, originals, 1).isfinite().all()
    policy["blur"]["kernel"] = 57
    with pytest.raises(ValueError, match="kernel=57 reaches over views of 28 x 28"):
        augment(policy, originals, 1)


FORK = """
import os
from ssl_runner.fused import threads

threads(2).submit(int).result()
child = os.fork()
threads(2).submit(int).result(10)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_fork_has_threads_of_its_own() -> None:
    """With its parent's, which it does not have, it would wait for ever."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60, cwd=Path(__file__).parents[1])


def test_threads_change_nothing() -> None:
    originals, threads = torch.randint(0, 256, (150, 3, 16, 16), dtype=torch.uint8), torch.get_num_threads()
    made = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            made.append(augment(FULL, originals, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize(
    "settings", [FULL, {}, {"flip": 0.5}, {"affine": AFFINE}, {"affine": AFFINE} | FULL], ids=str
)
def test_views_of_another_size_are_those_of_the_own_size_made_smaller(settings: dict, size: int) -> None:
    """Smooth images: what is made small at once is nearly what is shrunk afterwards, with the same random numbers."""
    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    originals = (F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).byte()
    smooth = {name: value for name, value in settings.items() if name != "solarize"}
    policy, mean, std = Augment({"all": smooth}), torch.zeros(3), torch.ones(3)
    small = policy(originals, 2, mean, std, torch.Generator().manual_seed(3), size=size)
    large = policy(originals, 2, mean, std, torch.Generator().manual_seed(3))
    assert small.shape == (12, 3, size, size)
    assert (small - TF.resize(large, [size, size], antialias=True)).abs().mean() < 0.03


def test_a_size_without_crop_resizes_as_torchvision() -> None:
    originals = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    X = Augment({"all": {}})(originals, 2, torch.zeros(3), torch.ones(3), torch.Generator(), size=12)
    assert_close(
        X, TF.resize(originals / 255, [12, 12], antialias=True).repeat(2, 1, 1, 1), atol=1e-5, rtol=0
    )


def test_the_generator_alone_decides() -> None:
    originals = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    first = augment(FULL, originals, 2, seed=1)
    torch.rand(5)
    assert torch.equal(first, augment(FULL, originals, 2, seed=1))
    assert not torch.equal(first, augment(FULL, originals, 2, seed=2))


@pytest.mark.parametrize("V", [2, 3, 5])
def test_policies_take_turns(V: int) -> None:
    """The first policy leaves the image, the second inverts it: view v shows policy v mod 2."""
    originals = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    both = Augment({"first": {}, "second": {"solarize": {"p": 1.0, "threshold": 0.0}}})
    X = both(originals, V, torch.zeros(3), torch.ones(3), torch.Generator()).unflatten(0, (V, 4))
    plain = originals.float() / 255
    for v in range(V):
        assert_close(X[v], 1 - plain if v % 2 else plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": 1.5},
        {"grayscale": -0.1},
        {"crop": {"scale": [0.0, 1.0]}},
        {"crop": {"scale": [0.5, 0.2]}},
        {"crop": {}},
        {"affine": {"degrees": 10, "scale": [0, 1]}},
        {"affine": {"turn": 10}},
        {"jitter": {"p": 0.8, "hue": 0.7}},
        {"blur": {"p": 0.5, "sigma": [0, 1]}},
        {"blur": {"p": 0.5, "sigma": [0.1, 1], "kernel": 4}},
        {"solarize": {"p": 2, "threshold": 0.5}},
        {"flip": "often"},
        {"crop": 0.5},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_refused(settings: dict) -> None:
    with pytest.raises((ValueError, TypeError), match="views"):
        Augment({"all": settings})


def test_preview(ssl_run, tmp_path: Path) -> None:
    from PIL import Image

    from tests.conftest import TINY, run_folder

    code, out, err = ssl_run(f"{TINY} V=3 views.preview=true epochs=1")
    assert (code, err) == (0, "")
    with Image.open(run_folder(out) / "views.png") as picture:
        assert picture.width == 4 * (28 * 3 + 2) + 2
        assert len(picture.getcolors(2**24)) > 100
