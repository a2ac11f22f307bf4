"""`dataset=hf` on small data sets saved to disk, without a network."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_runner.data import decoded, hugging_face
from ssl_runner.data.dataset import Source
from ssl_runner.errors import UsageError

datasets = pytest.importorskip("datasets")

SETTINGS = {
    "image": "image",
    "label": "label",
    "train": "train",
    "test": "test",
    "unlabeled": None,
    "size": None,
    "channels": None,
}


def split(n: int, seed: int, label: Any = None, size: tuple[int, int] = (12, 12)) -> Any:
    """n random images with labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]
    label = label or datasets.ClassLabel(names=["cat", "dog", "bird"])
    values = [i % 3 for i in range(n)]
    if label.dtype == "string":
        values = [("two", "zero", "one")[value] for value in values]
    return datasets.Dataset.from_dict(
        {"image": images, "label": values}, datasets.Features({"image": datasets.Image(), "label": label})
    )


def save(folder: Path, **splits: Any) -> Path:
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def read(path: Path, **settings: Any) -> Source:
    return hugging_face.hf(str(path), cache=str(path.parent / "cache"), **(SETTINGS | settings))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, train=split(9, 0), test=split(6, 1), more=split(5, 2).remove_columns("label"))


def test_saved_images_and_labels_are_read(saved: Path) -> None:
    data = read(saved, unlabeled="more")
    assert data.classes == ["cat", "dog", "bird"]
    assert data.labels.tolist() == [0, 1, 2] * 5 + [-1] * 5
    assert (data.train.tolist(), data.test.tolist()) == ([*range(9)], [*range(9, 15)])
    assert data.unlabeled.tolist() == [*range(15, 20)]
    stored = datasets.load_from_disk(str(saved))
    expected = [image for name in ("train", "test", "more") for image in stored[name]["image"]]
    for image, original in zip(data.images, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(original))


def test_test_split_and_labels_may_be_left_out(saved: Path) -> None:
    without_test = read(saved, test=None, unlabeled="more")
    assert without_test.labels.tolist() == [0, 1, 2] * 3 + [-1] * 5
    assert (len(without_test.train), len(without_test.test), len(without_test.unlabeled)) == (9, 0, 5)
    without_labels = read(saved, label=None, train="more", test="not read", unlabeled="train")
    assert without_labels.classes == []
    assert without_labels.labels.tolist() == [-1] * 14
    assert (len(without_labels.train), len(without_labels.test)) == (0, 0)
    assert without_labels.unlabeled.tolist() == [*range(14)]


def test_images_are_decoded_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(saved).images.clone()
    monkeypatch.setattr(decoded, "_decode", None)
    assert torch.equal(read(saved).images, first)
    with pytest.raises(TypeError):
        read(saved, size=8)


def test_size_and_channels(tmp_path: Path) -> None:
    wide = save(tmp_path, train=split(6, 0, size=(20, 12)), test=split(6, 1))
    assert read(wide, size=8, channels=1).images.shape == (12, 1, 8, 8)
    for settings, message in (({}, "found 20 x 12 pixels; set dataset.size"), ({"train": "test"}, "")):
        if message:
            with pytest.raises(UsageError, match=message):
                read(wide, **settings)
        else:
            assert read(wide, **settings).images.shape == (12, 3, 12, 12)


def test_labels_of_text_are_sorted_classes(tmp_path: Path) -> None:
    text = datasets.Value("string")
    data = read(save(tmp_path, train=split(6, 0, text), test=split(3, 1, text)))
    assert data.classes == ["one", "two", "zero"]
    assert data.labels.tolist() == [1, 2, 0] * 3


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["dog", "cat", "bird"])
    with pytest.raises(UsageError, match=r"dataset.label=label: expected the same classes in each split"):
        read(save(tmp_path, train=split(6, 0), test=split(3, 1, other)))


def test_missing_labels_are_refused(tmp_path: Path) -> None:
    hidden = split(3, 1).map(lambda row: {"label": -1})
    with pytest.raises(UsageError, match=r"expected one of 3 classes for each image, found -1 \(3 such"):
        read(save(tmp_path, train=split(6, 0), test=hidden))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test": "val"}, "dataset.test=val: expected a split; use one of train, test, more"),
        ({"label": "y"}, "dataset.label=y: expected a column of .* use one of image, label"),
        ({"image": "label"}, "dataset.image=label: expected a column of images, found ClassLabel"),
        ({"label": "image"}, "dataset.label=image: expected one value for each image"),
        ({"train": "more"}, "dataset.label=label: expected a column of .* .more.; use one of image"),
    ],
)
def test_unknown_split_or_column_is_refused(saved: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read(saved, **settings)
    assert "\n" not in str(error.value)


def test_broken_image_is_refused(tmp_path: Path) -> None:
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"hello", "path": "odd.png"}] * 3, "label": [0, 1, 2]}, split(1, 0).features
    )
    with pytest.raises(UsageError, match=r"odd.png: expected a readable image"):
        read(save(tmp_path, train=split(6, 0), test=broken))
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no image"), (b"", "no image"), (b"hello", "not an image of a format that Pillow reads")],
)
def test_message_on_a_broken_image_without_a_path_names_split_and_row(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    whole = split(3, 1).cast_column("image", datasets.Image(decode=False)).to_dict()
    whole["image"][1] = content if content is None else {"bytes": content, "path": None}
    broken = datasets.Dataset.from_dict(whole, split(1, 0).features)
    with pytest.raises(UsageError) as error:
        read(save(tmp_path, train=split(6, 0), held=broken), test="held")
    assert str(error.value) == (
        f"image 1 of split held (dataset.image=image): expected a readable image ({reason});"
        " repair it, and save the data set again"
    )


def test_interrupted_decode_resumes_at_the_last_block(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(saved).images.clone()
    for file in (saved.parent / "cache").iterdir():
        file.unlink()
    monkeypatch.setattr(decoded, "BLOCK_BYTES", 4 * 3 * 12 * 12)  # four images
    read_one, calls = decoded._read, []

    def interrupted(row, size, channels):
        calls.append(row)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read_one(row, size, channels)

    monkeypatch.setattr(decoded, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(saved)
    monkeypatch.setattr(decoded, "_read", lambda row, *options: calls.append(row) or read_one(row, *options))
    calls.clear()
    assert torch.equal(read(saved).images, expected)
    assert 8 <= len(calls) - 1 <= 11  # without the first block, or the first two; one more for the side


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: expected a folder written by save_to_disk, or a name"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"dataset.name=null: expected a data set of the Hugging Face Hub"):
        hugging_face.hf(None, cache="", **SETTINGS)


def test_missing_library_is_refused_with_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"expected the library datasets .* pip install 'ssl_runner\[hf\]'"):
        read(saved)


def test_run_on_saved_data_set(ssl_run, tmp_path: Path) -> None:
    """The options of the command line reach the reader."""
    path = save(tmp_path, train=split(90, 0), test=split(9, 1))
    code, out, err = ssl_run(
        f"dataset=hf dataset.name={path} dataset.size=16 dataset.channels=1 dataset.cache={tmp_path}/cache"
        " dataset.val_fraction=0.2 epochs=1 batch_size=18 backbone.widths=[8] projector.width=8 projector.K=4"
        " probe.probes=[knn] probe.features=[backbone] views=none diagnostics.every=0"
        " device=cpu precision=fp32 embedding.method=none"
    )
    assert (code, "top1=" in out) == (0, True), err
