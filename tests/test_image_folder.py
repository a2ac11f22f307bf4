"""Folders and lists of image files: every layout, every odd file, and the cache of decoded images."""

import json
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_runner.data import decoded, image_folder
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError
from tests.helpers import load


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes: 12 x 12 images in several formats and modes, and other files to be skipped."""
    root = tmp_path / "pictures"
    for part, n in (("train", 8), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                colour = (20 * i, 100 * label, 7)
                image = Image.new("RGB", (12, 12), colour)
                if i == 1:
                    image = image.convert("L")
                if i == 2:
                    image = image.convert("P")
                image.save(root / part / name / f"{i}.{('png', 'bmp', 'gif', 'webp')[i % 4]}", lossless=True)
            (root / part / name / "notes.txt").write_text("not an image")
            (root / part / name / ".hidden.png").write_text("not an image either")
    return root


def read_folder(root: Path, size: int | None = None) -> Source:
    return image_folder.folder(str(root), size, str(root.parent / "cache"))


def test_folder_images_and_labels_are_in_file_order(pictures: Path) -> None:
    data = read_folder(pictures)
    assert data.images.shape == (22, 3, 12, 12)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 8 + [1] * 8 + [0] * 3 + [1] * 3
    assert (len(data.train), len(data.test)) == (16, 6)
    files = [
        pictures / "train" / name / f"{i}.{('png', 'bmp', 'gif', 'webp')[i % 4]}"
        for name in data.classes
        for i in range(8)
    ]
    for row, file in enumerate(files):
        with Image.open(file) as image:
            assert np.array_equal(data.images[row].permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_folder_cache_is_reused_while_files_are_unchanged(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_folder(pictures).images.clone()
    decode, calls = decoded._decode, []

    def counting(files, *options):
        calls.append(files)
        decode(files, *options)

    monkeypatch.setattr(decoded, "_decode", counting)
    assert torch.equal(read_folder(pictures).images, first)
    assert calls == []
    Image.new("RGB", (12, 12), (255, 255, 255)).save(pictures / "train" / "cat" / "0.png")
    changed = read_folder(pictures).images
    assert len(calls) == 1
    assert (changed[0] == 255).all()
    assert torch.equal(changed[1:], first[1:])
    assert read_folder(pictures, size=6).images.shape == (22, 3, 6, 6)
    assert len(calls) == 2


def test_folder_images_are_centre_cropped_and_resized(pictures: Path) -> None:
    wide = Image.new("RGB", (36, 12), (255, 0, 0))
    wide.paste((0, 0, 255), (12, 0, 24, 12))
    wide.save(pictures / "train" / "cat" / "0.png")
    image = read_folder(pictures, size=6).images[0]
    inner = image[:, :, 1:-1]  # the resampling filter crosses the edge of the crop
    assert torch.equal(inner, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 6, 4))


def test_folder_converts_16_bit_transparent_and_rotated_images(pictures: Path) -> None:
    """16-bit values are scaled, not clipped; transparent pixels are white; EXIF rotation is applied."""
    cat = pictures / "train" / "cat"
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(cat / "0.png")
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save(cat / "4.png")
    turned = Image.new("RGB", (12, 12), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 12, 6))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(cat / "5.png", exif=exif)
    (cat / "5.bmp").unlink()
    images = read_folder(pictures).images
    assert (images[0] == 40_000 >> 8).all()
    assert (images[4] == 255).all()
    assert images[5, :, 0, 0].tolist() == [255, 0, 0]
    assert images[5, :, -1, 0].tolist() == [0, 0, 255]


def test_invalid_folder_raises_one_line_usage_error(pictures: Path) -> None:
    def check_error(message: str, size: int | None = None) -> None:
        with pytest.raises(UsageError, match=message) as error:
            read_folder(pictures, size)
        assert "\n" not in str(error.value)
        assert not list((pictures.parent / "cache").glob("*.npy*"))

    odd = pictures / "train" / "cat" / "odd.png"
    Image.new("RGB", (9, 12)).save(odd)
    check_error("odd.png: expected 12 x 12 pixels as in 0.png, found 9 x 12; set dataset.size")
    odd.write_bytes((pictures / "train" / "cat" / "0.png").read_bytes()[:40])
    check_error("odd.png: expected a readable image", size=8)
    odd.write_text("hello")
    check_error("odd.png: expected a readable image")
    odd.unlink()
    odd.symlink_to(pictures / "gone.png")
    check_error("odd.png: expected a readable file .No such file")
    odd.unlink()
    (pictures / "train" / "cat" / "notes.pdf").write_text("not an image")
    (pictures / "train" / "bird").mkdir()
    check_error("bird: expected image files")
    Image.new("RGB", (12, 12)).save(pictures / "test" / "0.png")
    (pictures / "train" / "bird").rmdir()
    (pictures / "test" / "bird").mkdir()
    Image.new("RGB", (12, 12)).save(pictures / "test" / "bird" / "0.png")
    check_error("expected in test and val only classes of train; .* bird$")
    shutil.rmtree(pictures / "train")
    check_error("expected train beside test, but train is missing")


# --- layouts ------------------------------------------------------------------------------------------------


def make(root: Path, names: str) -> dict[str, int]:
    """Write a 4 x 4 image for each name, all of its own colour. Returns the names by colour."""
    for colour, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(root / name, "PNG")
    return {name: colour for colour, name in enumerate(names.split())}


def read(tmp_path: Path, root: object = "root", **options: object) -> Source:
    """Read folders below tmp_path, or a list."""
    roots = [str(tmp_path / one) for one in root] if isinstance(root, list) else root and f"{tmp_path}/{root}"
    return image_folder.folder(roots, None, str(tmp_path / "cache"), **options)


def content(source: Source, names: dict[str, int]) -> dict[str, str]:
    """What is in each split: `class:file` names in the order of the rows."""
    by_colour = {colour: name for name, colour in names.items()}

    def text(row: int) -> str:
        label = source.labels[row]
        name = by_colour[int(source.images[row, 0, 0, 0])]
        return name if label < 0 else f"{source.classes[label]}:{name}"

    splits = {"train": source.train, "val": source.val, "test": source.test, "unlabeled": source.unlabeled}
    return {
        name: " ".join(map(text, rows)) for name, rows in splits.items() if rows is not None and len(rows)
    }


LAYOUTS = {
    "flat": ("b.png a.png", {}, "**, unlabelled", {"unlabeled": "a.png b.png"}),
    "nested": (
        "x/y/1.png x/y/z/2.png x/0.png",
        {},
        "**, unlabelled",
        {"unlabeled": "x/0.png x/y/1.png x/y/z/2.png"},
    ),
    "several depths": (
        "a/1.png b/c/2.png",
        {},
        "**, unlabelled (dataset.labels=true takes sub-folders as classes)",
        {"unlabeled": "a/1.png b/c/2.png"},
    ),
    "one sub-folder": ("a/1.png", {}, "**, unlabelled", {"unlabeled": "a/1.png"}),
    "classes": ("b/1.png a/2.png a/1.png", {}, "<class>/**", {"train": "a:a/1.png a:a/2.png b:b/1.png"}),
    "deep classes": ("a/x/1.png b/y/2.png", {}, "<class>/**", {"train": "a:a/x/1.png b:b/y/2.png"}),
    "classes by option": (
        "a/1.png b/c/2.png",
        {"labels": True},
        "<class>/**",
        {"train": "a:a/1.png b:b/c/2.png"},
    ),
    "no classes by option": (
        "a/1.png b/2.png",
        {"labels": False},
        "**, unlabelled",
        {"unlabeled": "a/1.png b/2.png"},
    ),
    "class named train": (
        "bus/1.png train/2.png",
        {},
        "<class>/**",
        {"train": "bus:bus/1.png train:train/2.png"},
    ),
    "train": (
        "train/a/1.png train/b/x/2.png train/b/3.png",
        {},
        "train/<class>/**",
        {"train": "a:train/a/1.png b:train/b/3.png b:train/b/x/2.png"},
    ),
    "train and test": (
        "train/a/1.png train/b/2.png test/b/3.png",
        {},
        "train/<class>/**, test",
        {"train": "a:train/a/1.png b:train/b/2.png", "test": "b:test/b/3.png"},
    ),
    **{
        f"train and {val}": (
            f"train/a/1.png train/b/2.png {val}/a/3.png",
            {},
            "train/<class>/**, val",
            {"train": "a:train/a/1.png b:train/b/2.png", "val": f"a:{val}/a/3.png"},
        )
        for val in ("val", "valid", "validation")
    },
    "STL-10": (
        "train/a/1.png train/b/2.png test/a/3.png test/b/4.png unlabeled/5.png unlabeled/x/6.png",
        {},
        "train/<class>/**, test, unlabeled",
        {
            "train": "a:train/a/1.png b:train/b/2.png",
            "test": "a:test/a/3.png b:test/b/4.png",
            "unlabeled": "unlabeled/5.png unlabeled/x/6.png",
        },
    ),
    "capitals": (
        "Train/a/1.png Train/b/2.png VAL/b/3.png",
        {},
        "train/<class>/**, val",
        {"train": "a:Train/a/1.png b:Train/b/2.png", "val": "b:VAL/b/3.png"},
    ),
    "training and testing": (
        "Training/a/1.png Training/b/2.png Testing/b/3.png",
        {},
        "train/<class>/**, test",
        {"train": "a:Training/a/1.png b:Training/b/2.png", "test": "b:Testing/b/3.png"},
    ),
    "unlabelled": (
        "train/a/1.png train/b/2.png unlabelled/5.png",
        {},
        "train/<class>/**, unlabeled",
        {"train": "a:train/a/1.png b:train/b/2.png", "unlabeled": "unlabelled/5.png"},
    ),
    "flat train": (
        "train/1.png train/0.png",
        {},
        "train/**, unlabelled",
        {"unlabeled": "train/0.png train/1.png"},
    ),
    "train without classes by option": (
        "train/a/1.png train/b/0.png unlabeled/2.png",
        {"labels": False},
        "train/**, unlabelled",
        {"unlabeled": "train/a/1.png train/b/0.png unlabeled/2.png"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found(tmp_path: Path, layout: str) -> None:
    names, options, found, expected = LAYOUTS[layout]
    made = make(tmp_path / "root", names)
    source = read(tmp_path, **options)
    assert content(source, made) == expected
    assert source.layout == found
    assert str(source.skipped) == ""


def test_roots_are_joined_and_their_classes_united(tmp_path: Path) -> None:
    made = make(tmp_path, "one/b/0.png one/a/1.png two/c/2.png two/a/3.png")
    source = read(tmp_path, ["one", "two"])
    assert content(source, made) == {"train": "a:one/a/1.png a:two/a/3.png b:one/b/0.png c:two/c/2.png"}
    assert source.layout == "<class>/**, 2 roots"
    make(tmp_path, "three/0.png")
    with pytest.raises(UsageError, match=r"three: expected the layout of .*one, <class>/\*\*, found \*\*"):
        read(tmp_path, ["one", "three"])


@pytest.mark.parametrize("names", ["one ./one", "one link", "one/a one", "one two one/b"])
def test_repeated_root_raises_usage_error(tmp_path: Path, names: str) -> None:
    make(tmp_path, "one/a/1.png one/b/2.png two/a/1.png two/b/2.png")
    (tmp_path / "link").symlink_to("one")
    with pytest.raises(UsageError, match=r"dataset.root=.*: expected each folder once"):
        read(tmp_path, names.split())


REFUSED = {
    "dataset.root=null: expected a folder": ("1.png", {"root": None}),
    r"root/Train/c: expected image files .*found none \(skipped 1 file: 1 hidden\)": (
        "Train/a/1.png Train/b/2.png Train/c/.3.png",
        {},
    ),
    r"root/c: .*found none \(skipped 2 files: 1 \.heic \(no codec\), 1 without ending\)": (
        "a/1.png b/2.png c/3.heic c/4",
        {},
    ),
    "expected image files .* found none": ("", {}),
    "expected train beside test, but train is missing": ("test/a/1.png test/b/2.png", {}),
    "only classes of train; .* or remove c, d": ("train/a/1.png train/b/2.png val/c/3.png test/d/4.png", {}),
    r"root: expected at least 2 class folders, found 0;.*labels=false": ("1.png", {"labels": True}),
    r"train: expected at least 2 class folders, found 1": ("train/a/1.png", {"labels": True}),
    "dataset.on_error=ask: expected refuse or skip": ("1.png", {"on_error": "ask"}),
    "dataset.files=x.csv: expected dataset.root=null": ("1.png", {"files": "x.csv"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unusable_folder_raises_one_line_usage_error(tmp_path: Path, message: str) -> None:
    names, options = REFUSED[message]
    (tmp_path / "root").mkdir()
    make(tmp_path / "root", names)
    with pytest.raises(UsageError, match=message) as error:
        read(tmp_path, **options)
    assert "\n" not in str(error.value)


# --- lists --------------------------------------------------------------------------------------------------


def write_list(tmp_path: Path, text: str, names: str = "a.png b.png c.png d.png e.png") -> dict[str, int]:
    (tmp_path / "list.csv").write_text(text)
    return make(tmp_path, names)


LISTS = {
    "paths": ("path\nb.png\na.png", {"unlabeled": "b.png a.png"}),
    "capitals and spaces": (
        "path, label, split\na.png, x, Train\nb.png, y, TRAIN\nc.png, y , Testing\n",
        {"train": "x:a.png y:b.png", "test": "y:c.png"},
    ),
    "labels": (
        "label,path\ny,b.png\nx,a.png\ny,c.png\n,d.png\n",
        {"train": "x:a.png y:b.png y:c.png", "unlabeled": "d.png"},
    ),
    "splits": (
        "path,label,split,size\na.png,x,train,1\nb.png,y,,1\nc.png,x,validation,1\nd.png,y,test,1\n"
        "e.png,x,unlabelled,1\n",
        {"train": "x:a.png y:b.png", "val": "x:c.png", "test": "y:d.png", "unlabeled": "e.png"},
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_list_gives_files_labels_and_splits(tmp_path: Path, name: str) -> None:
    text, expected = LISTS[name]
    made = write_list(tmp_path, text)
    source = read(tmp_path, None, files=str(tmp_path / "list.csv"))
    assert content(source, made) == expected
    assert source.layout.startswith("list list.csv: path")


def test_list_without_labels_leaves_out_validation_and_test(tmp_path: Path) -> None:
    made = write_list(tmp_path, "path,split,label\na.png,train,x\nb.png,test,y\nc.png,val,x")
    source = read(tmp_path, None, files=str(tmp_path / "list.csv"), labels=False)
    assert content(source, made) == {"unlabeled": "a.png"}
    assert str(source.skipped) == "skipped 2 files: 2 in val or test (no training labels)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png", "expected a header with a column path, and rows, found the columns file and 1 row"),
        ("path", "found the columns path and 0 rows"),
        ("path,split\na.png,tran", "as split, found tran in line 2"),
        ("path\na.png\n\na.png", "each file once, found line 4"),
        ("path,label\n,x", "a path in each row, found line 2"),
        ("path\na,b.png", "expected 1 column in line 2, found 2; put quotes"),
        ("path,label\na.png,x", "expected at least 2 labels in train, found 1"),
        ("path,label,split\na.png,x,\nb.png,y,\nc.png,,val", "a label in each row of val and test, line 4"),
        ("path,label,split\na.png,x,\nb.png,y,\nc.png,z,val", "only labels of train, found z in line 4"),
        ("path,split\na.png,\n./a.png,test", "each file once, found line 3"),
        ("path,split\na.png,\nlink.png,test", "each file once, found line 3"),
        ("path,Label\na.png,x", "expected the columns path, label, split, found Label; rename"),
        ("path,labels\na.png,x", "expected the columns path, label, split, found labels; rename"),
        ("path,label,split\na.png,x,test\nb.png,y,val", "one row with the split train or unlabeled, found 2"),
        ("path,split\na.png,test", "one row with the split train or unlabeled, found 1"),
        ("path\na\0.png", "embedded null"),
        ("path\ngone.png", "gone.png: expected a readable file"),
    ],
)
def test_unusable_list_raises_one_line_usage_error(tmp_path: Path, text: str, message: str) -> None:
    write_list(tmp_path, text)
    (tmp_path / "link.png").symlink_to("a.png")
    with pytest.raises(UsageError, match=message) as error:
        read(tmp_path, None, files=str(tmp_path / "list.csv"))
    assert "\n" not in str(error.value)


# --- odd files ----------------------------------------------------------------------------------------------

SYMBOLS = ["a,b", "a=b", "a'b", 'a"b', "[a]", "{a}", "#a", "a b", " a", "$a", "%s"]
ODD_NAMES = [*SYMBOLS, "日本", "ß", "a\\b", "a\nb"]
NOT_UTF8 = os.fsdecode(b"\xff\xfe")


def test_images_above_the_limit_of_pillow_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a warning, which pytest raises as an error."""
    make(tmp_path / "root", "a/1.png a/2.png b/3.png b/4.png")
    for limit, cache in ((10, "warned"), (1, "refused")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        data = image_folder.folder(str(tmp_path / "root"), None, str(tmp_path / cache))
        assert len(data.images) == 4
        assert limit == Image.MAX_IMAGE_PIXELS


def test_odd_names_are_read(tmp_path: Path) -> None:
    for i, name in enumerate([*ODD_NAMES, NOT_UTF8]):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{name}.PNG")
    source = read(tmp_path)
    names = [*ODD_NAMES, r"\udcff\udcfe"]
    found = {source.classes[n]: int(x[0, 0, 0]) for n, x in zip(source.labels, source.images, strict=True)}
    assert found == {name: i for i, name in enumerate(names)}
    " ".join(source.classes).encode()
    assert torch.equal(read(tmp_path).images, source.images)


def test_odd_names_are_read_from_a_list(tmp_path: Path) -> None:
    lines = []
    for i, name in enumerate([*ODD_NAMES, NOT_UTF8]):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name, "PNG")
        lines.append(b'"%s"' % os.fsencode(name).replace(b'"', b'""'))
    (tmp_path / "list.csv").write_bytes(b"path\n" + b"\n".join(lines))
    source = read(tmp_path, None, files=str(tmp_path / "list.csv"))
    assert source.images[:, 0, 0, 0].tolist() == list(range(len(lines)))


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    made = make(tmp_path, "root/a/1.png root/b/2.png elsewhere/3.png elsewhere/sub/4.png")
    root = tmp_path / "root"
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "5.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (root / "loop").symlink_to(root)
    (root / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "sub" / "self").symlink_to(".")
    source = read(tmp_path, labels=True)
    assert content(source, made) == {
        "train": "a:root/a/1.png a:elsewhere/3.png b:root/b/2.png c:elsewhere/3.png c:elsewhere/sub/4.png"
    }
    assert source.skipped.counts == {"linked again": 3}


def test_skipped_files_are_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root, "train/a/1.JPG train/b/2.Tiff test/a/3.png")
    for name in ("notes.txt", "train/a/x.TXT", "train/b/.hidden.png", "train/b/x.heic", "train/b/README"):
        (root / name).write_text("x")
    make(root, "train/0.png test/0.png extra/0.png")
    os.mkfifo(root / "train" / "a" / "pipe.png")
    (root / ".git").mkdir()
    source = read(tmp_path)
    assert (len(source.train), len(source.test)) == (2, 1)
    assert source.skipped.counts == {
        ".txt": 2,
        "hidden": 2,
        ".heic (no codec)": 1,
        "without ending": 1,
        "not a regular file": 1,
        "directly in train/": 1,
        "directly in test/": 1,
        "outside of the splits": 1,
    }
    assert str(source.skipped).startswith("skipped 10 files: 2 ")
    record = json.loads(json.dumps(source.skipped.record()))
    assert len(record["files"]) == 10
    assert str(root / "train" / "b" / "x.heic") in record["files"]


def test_broken_files_are_refused_or_skipped_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    made = make(root, "a/0.png a/1.png a/2.png b/3.png b/4.png")
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(whole[:40])
    (root / "b" / "4.png").write_bytes(b"")
    (root / "b" / "5.png").symlink_to("gone.png")
    with pytest.raises(UsageError, match=r"5.png: expected a readable file .*; .* dataset.on_error=skip"):
        read(tmp_path)
    (root / "b" / "5.png").unlink()
    with pytest.raises(UsageError, match=r"a/0.png: expected a readable image .*; .* dataset.on_error=skip"):
        read(tmp_path)
    (root / "b" / "5.png").symlink_to("gone.png")
    for _ in range(2):
        source = read(tmp_path, on_error="skip")
        assert content(source, made) == {"train": "a:a/1.png a:a/2.png b:b/3.png"}
        assert source.skipped.counts == {"broken": 2, "unreadable": 1}
        monkeypatch.setattr(decoded, "_decode", None)  # the second time reads the cache
    monkeypatch.undo()
    (root / "b" / "5.png").unlink()
    with pytest.raises(UsageError, match=r"0.png: expected a readable image"):
        read(tmp_path)


def test_unreadable_files_keep_their_indices(tmp_path: Path) -> None:
    made = write_list(tmp_path, "path\ngone.png\na\0.png\na.png\nb.png\n")
    source = read(tmp_path, None, files=str(tmp_path / "list.csv"), on_error="skip")
    assert content(source, made) == {"unlabeled": "a.png b.png"}
    assert source.unlabeled.tolist() == [2, 3]
    assert source.skipped.counts == {"unreadable": 1, "broken": 1}
    (tmp_path / "list.csv").write_text("path\ngone.png\n")
    with pytest.raises(UsageError, match=r"on_error=skip: expected at least one readable image; repair"):
        read(tmp_path, None, files=str(tmp_path / "list.csv"), on_error="skip")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError("a newer format")])
def test_file_that_becomes_readable_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """Permissions and codecs change neither length nor modification time of a file."""
    make(tmp_path / "root", "0.png 1.png 2.png")
    open_image = Image.open

    def failing(file):
        if file.name == "1.png":
            raise error
        return open_image(file)

    monkeypatch.setattr(Image, "open", failing)
    for _ in range(2):
        assert read(tmp_path, on_error="skip").unlabeled.tolist() == [0, 2]
    with pytest.raises(UsageError, match=r"1.png: expected a readable (file \(Permission|image \(a newer)"):
        read(tmp_path)
    monkeypatch.undo()
    for _ in range(2):
        assert read(tmp_path).images[:, 0, 0, 0].tolist() == [0, 1, 2]
    [record] = (tmp_path / "cache").glob("*.json")
    assert json.loads(record.read_text()) == {"broken": []}


def test_image_of_unsupported_kind_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "root", "0.png 1.png")
    sizes, kind = struct.pack("<7I44x", 124, 0x1007, 4, 4, 16, 0, 0), struct.pack("<2I4s40x", 32, 4, b"ABCD")
    (tmp_path / "root" / "2.dds").write_bytes(b"DDS " + sizes + kind + bytes(64))
    with pytest.raises(UsageError, match=r"2.dds: expected a readable image .Unimplemented pixel format"):
        read(tmp_path)
    assert read(tmp_path, on_error="skip").unlabeled.tolist() == [0, 1]


def test_endings_without_meaning_are_one_kind(tmp_path: Path) -> None:
    make(tmp_path / "root", "0.png")
    for i in range(30):
        (tmp_path / "root" / f"1.2.840.{i}").write_text("x")
        (tmp_path / "root" / f"x.abcdef{chr(97 + i % 26)}{i}").write_text("x")
        (tmp_path / "root" / f"y.a{i}").write_text("x")
    skipped = read(tmp_path).skipped
    assert skipped.counts["with another ending"] == 60
    assert len(skipped.record()["counts"]) == str(skipped).count(",") + 1 == 11
    assert str(skipped).startswith("skipped 90 files: 60 with another ending, 1 .a")
    assert str(skipped).endswith(", 21 of other kinds")


def test_class_without_readable_image_raises_usage_error(tmp_path: Path) -> None:
    make(tmp_path / "root", "a/0.png b/1.png")
    (tmp_path / "root" / "b" / "1.png").write_text("x")
    with pytest.raises(UsageError, match="a readable training image in each class, found none in b"):
        read(tmp_path, on_error="skip")


# --- the decoded file ---------------------------------------------------------------------------------------


def test_interrupted_decode_resumes_at_the_last_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "root", " ".join(f"{i:02}.png" for i in range(10)))
    (tmp_path / "root" / "01.png").write_text("x")
    monkeypatch.setattr(decoded, "BLOCK_BYTES", 3 * 48)  # three images
    read_one, calls = decoded._read, []

    def interrupted(file, size, channels):
        calls.append(file.name)
        if file.name == "07.png" and "interrupt" not in calls:
            calls.append("interrupt")
            raise KeyboardInterrupt
        return read_one(file, size, channels)

    monkeypatch.setattr(decoded, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, on_error="skip")
    [partial] = (tmp_path / "cache").glob("*.npy.partial")
    partial.write_bytes(partial.read_bytes() + b"part of a block")
    calls[:] = ["interrupt"]
    source = read(tmp_path, on_error="skip")
    assert sorted(set(calls[1:])) == ["00.png", "01.png", "06.png", "07.png", "08.png", "09.png"]
    # 00 for the side, and 01 since it is broken
    assert source.images[:, 0, 0, 0].tolist() == [0, 0, *range(2, 10)]
    assert source.unlabeled.tolist() == [0, *range(2, 10)]
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".npy", ".json", ".lock"}


def test_processes_that_decode_at_once_agree(tmp_path: Path) -> None:
    make(tmp_path / "root", " ".join(f"{i:02}.png" for i in range(40)))
    with ThreadPoolExecutor(4) as threads:
        sources = list(threads.map(lambda _: read(tmp_path), range(4)))
    for source in sources:
        assert source.images[:, 0, 0, 0].tolist() == list(range(40))


# --- splits -------------------------------------------------------------------------------------------------


def test_class_with_one_image_is_trained_on(tmp_path: Path) -> None:
    make(tmp_path / "root", "a/0.png " + " ".join(f"b/{i}.png c/{i}.png" for i in range(10)))
    data = load(read(tmp_path), val_fraction=0.2)
    assert torch.bincount(data.train.y).tolist() == [1, 8, 8]
    assert torch.bincount(data.val.y).tolist() == [0, 2, 2]


def test_validation_split_of_its_own_is_used(tmp_path: Path) -> None:
    make(tmp_path / "root", "train/a/0.png train/b/1.png train/b/2.png val/a/3.png")
    data = load(read(tmp_path), val_fraction=0.5)
    assert (len(data.train), data.val.y.tolist(), len(data.test)) == (3, [0], 0)


def test_refused_decode_resumes_at_the_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "root", " ".join(f"{i:02}.png" for i in range(10)))
    (tmp_path / "root" / "07.png").write_text("x")
    monkeypatch.setattr(decoded, "BLOCK_BYTES", 3 * 48)  # three images
    with pytest.raises(UsageError, match=r"07.png: expected a readable image"):
        read(tmp_path)
    read_one, calls = decoded._read, set()

    def counting(file, size, channels):
        calls.add(file.name)
        return read_one(file, size, channels)

    monkeypatch.setattr(decoded, "_read", counting)
    assert read(tmp_path, on_error="skip").images[:, 0, 0, 0].tolist() == [*range(7), 0, 8, 9]
    assert calls == {"00.png", "06.png", "07.png", "08.png", "09.png"}  # 00 for the side


def test_decoded_file_is_read_without_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cache that is read-only."""
    make(tmp_path / "root", "0.png 1.png")
    read(tmp_path)
    monkeypatch.setattr(decoded, "FileLock", None)
    assert read(tmp_path).images[:, 0, 0, 0].tolist() == [0, 1]


def test_waiting_for_another_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(decoded, "QUIET_WAIT", 0.05)
    with ThreadPoolExecutor(1) as thread:
        with decoded._locked(tmp_path / "x.npy"):
            assert capsys.readouterr().err == ""
            waiting = thread.submit(lambda: decoded._locked(tmp_path / "x.npy").__enter__())
            time.sleep(0.3)
            assert not waiting.done()
        waiting.result()
    assert capsys.readouterr().err.startswith("waiting for another process that decodes the same images: ")


def test_one_image_per_class_is_used_without_labels(tmp_path: Path) -> None:
    make(tmp_path / "root", " ".join(f"{i:02}/0.png" for i in range(10)))
    data = load(read(tmp_path))
    assert (len(data.pretrain), len(data.train), len(data.val), len(data.test)) == (10, 0, 0, 0)
    assert data.classes == []
    assert set(data.pretrain.y.tolist()) == {-1}
    assert data.layout == "<class>/**, one image in each class: unlabelled"
    assert len(load(read(tmp_path), subset=4).pretrain) == 4
    make(tmp_path / "root", " ".join(f"{i:02}/1.png" for i in range(10)))
    assert len(load(read(tmp_path), val_fraction=0.1).val) == 2
