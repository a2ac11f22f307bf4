"""MultiViewLoader: data order, views, shards of several ranks, progressive resizing, fixed batches."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import distributed
from ssl_runner.batch import Batch
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.views import Augment
from tests.helpers import noise_loader

UNCHANGED = Augment({"all": {}})


def permutations(seed: int) -> Iterator[Tensor]:
    """The permutations of 60 images that one generator draws in consecutive epochs."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(60, generator=generator)


@pytest.mark.parametrize("epochs", [[0, 1, 2, 3], [3, 0, 2, 1], [1, 1, 0, 0, 2]])
def test_order_depends_on_seed_and_epoch_only(epochs: list[int]) -> None:
    expected = list(itertools.islice(permutations(seed=5), 4))
    loader, other = noise_loader(seed=5, batch_size=25), noise_loader(UNCHANGED, seed=6, V=3, batch_size=25)
    for epoch in epochs:
        assert torch.equal(loader.order(epoch), expected[epoch][:50])  # two full batches
        assert not torch.equal(other.order(epoch), expected[epoch][:50])
        next(loader.batches(epoch))  # advances the generator of the views only


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("V", [2, 3])
def test_batches_hold_normalized_views_with_labels_and_indices(V: int, storage: str) -> None:
    loader = noise_loader(UNCHANGED, V=V, storage=storage)
    data, mean, std = loader.data.pretrain, loader.data.mean, loader.data.std
    batches = list(loader.batches(1))
    assert len(batches) == loader.steps_per_epoch == 3
    for (X, batch), positions in zip(batches, loader.order(1).split(20), strict=True):
        indices = data.indices[positions]
        expected = (data.images[indices] / 255 - mean[:, None, None]) / std[:, None, None]
        for view in X.unflatten(0, (V, 20)):
            assert_close(view, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.indices, indices)
        assert torch.equal(batch.labels, data.labels[indices])
        assert (batch.V, batch.num_classes) == (V, 4)


def test_size_changes_the_number_of_images_per_batch() -> None:
    loader = noise_loader(UNCHANGED)
    batches = list(loader.batches(0, size=50))
    assert [len(batch.labels) for _, batch in batches] == [50, 10]
    seen = torch.cat([batch.indices for _, batch in batches])
    assert torch.equal(seen, loader.data.pretrain.indices[loader.order(0)])


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resume_within_an_epoch_gives_the_remaining_batches(stop: int) -> None:
    whole, first, second = noise_loader(), noise_loader(), noise_loader()
    uninterrupted = [X for epoch in (0, 1) for X, _ in whole.batches(epoch)]
    begun = [X for X, _ in itertools.islice(first.batches(0), stop)]
    second.load_state_dict(first.state_dict())
    rest = [X for epoch, start in ((0, stop), (1, 0)) for X, _ in second.batches(epoch, start)]
    assert_close(begun + rest, uninterrupted, rtol=0, atol=0)


def batches_of_rank(
    rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch, whole_batch: bool = False
) -> list[tuple[Tensor, Batch]]:
    """The batches of an epoch on one of several ranks."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    return list(noise_loader(V=3).batches(0, whole_batch=whole_batch))


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_each_rank_yields_its_chunk_of_every_batch(
    ranks: int, whole_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = list(noise_loader(V=3).batches(0))
    for rank in range(ranks):
        shards = batches_of_rank(rank, ranks, monkeypatch, whole_batch)
        for (X, batch), (own, shard) in zip(single, shards, strict=True):
            views = X.unflatten(0, (3, 20)).chunk(ranks, dim=1)[rank].flatten(0, 1)
            assert_close(own, views, rtol=0, atol=1e-6)
            for name in ("indices", "labels"):
                value = getattr(batch, name)
                expected = value if whole_batch else value.chunk(ranks)[rank]
                assert torch.equal(getattr(shard, name), expected)


@pytest.mark.parametrize(
    ("resolutions", "expected"),
    [
        ([None], [4] * 9),
        ([2, 3, 4], [2, 2, 2, 3, 3, 3, 4, 4, 4]),
        ([2, None], [2, 2, 2, 2, 2, 4, 4, 4, 4]),
        ([3, 2], [3, 3, 3, 3, 3, 2, 2, 2, 2]),
    ],
)
def test_resolutions_are_used_for_equal_parts_of_training(
    resolutions: list[int | None], expected: list[int]
) -> None:
    loader = noise_loader(epochs=3, resolutions=resolutions)
    shapes = [X.shape for epoch in range(3) for X, _ in loader.batches(epoch)]
    assert shapes == [(40, 3, side, side) for side in expected]
    resumed = noise_loader(epochs=3, resolutions=resolutions)
    assert [X.shape[-1] for X, _ in resumed.batches(1, start=2)] == expected[5:6]


def test_fixed_batch_is_the_same_on_every_call() -> None:
    loader = noise_loader()
    images, positions = loader.data.train, torch.tensor([3, 0, 17])
    X, batch = loader.fixed_batch(images, positions)
    assert X.shape == (6, 3, 4, 4)
    assert torch.equal(batch.indices, images.indices[positions])
    assert torch.equal(batch.labels, images.y[positions])
    training = [views for views, _ in loader.batches(0)]
    assert torch.equal(loader.fixed_batch(images, positions)[0], X)
    assert_close([views for views, _ in noise_loader().batches(0)], training, rtol=0, atol=0)


def test_restarted_loader_yields_the_first_batches_again() -> None:
    loader = noise_loader(V=3, epochs=2, resolutions=[2, 4])
    batches = [X for epoch in (0, 1) for X, _ in loader.batches(epoch)]
    restarted = loader.restarted()
    assert_close([X for epoch in (0, 1) for X, _ in restarted.batches(epoch)], batches, rtol=0, atol=0)


def test_views_of_all_ranks_advance_the_generator_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of one rank serves any number of ranks."""

    def state(loader: MultiViewLoader) -> Tensor:
        next(loader.batches(0))
        return loader.state_dict()["view_generator"]

    single = state(noise_loader())
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert torch.equal(state(noise_loader()), single)
