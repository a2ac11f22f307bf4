"""How a batch gets its relation: each maker against the definition, row by row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import relate, relation
from ssl_runner.errors import Refused
from ssl_runner.relate import Batch, BatchRelation

LABELS = torch.tensor([0, 1, 0, 2, 1, 1])
ROWS = torch.tensor([3, 0, 5, 1])


def batch(V: int = 2, rows: Tensor = ROWS) -> Batch:
    return Batch(rows, LABELS[rows], V, 3)


def test_views_and_labels() -> None:
    Z = torch.randn(12, 5)
    assert_close(relate.Views()(batch(3), Z).dense(), relation.Views(4, 3).dense())
    assert_close(relate.Views(True)(batch(3), Z).dense(), relation.Views(4, 3, True).dense())
    labels = LABELS[ROWS].repeat(3)
    assert_close(relate.Labels()(batch(3), Z).dense(), ((labels[:, None] == labels).float() - torch.eye(12)))


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_neighbors_relates_every_view_of_the_nearest_originals(k: int, V: int) -> None:
    Z = torch.randn(V * 4, 5)
    G = relate.Neighbors(k)(batch(V), Z).dense()
    means = torch.nn.functional.normalize(Z.view(V, 4, 5).mean(0))
    nearest = [
        [j for j in sorted(range(4), key=lambda j: -float(means[i] @ means[j])) if j != i][:k]
        for i in range(4)
    ]
    for r in range(4 * V):
        for s in range(4 * V):
            i, j = r % 4, s % 4
            assert G[r, s] == float(r != s and (i == j or j in nearest[i] or i in nearest[j]))


def passes(n: int) -> Iterator[Tensor]:
    """Rows of ten batches of 4, in passes over the rows 0 ... n - 1, each in another order."""
    order = torch.cat([torch.randperm(n) for _ in range(40 // n)])
    yield from order.split(4)


def test_the_queue_holds_the_last_originals_and_supports_with_the_nearest_others() -> None:
    """Five passes over 8 images with a queue of 7, in which an image's own embedding is then often one of the nearest."""
    maker, seen, seen_rows, met = (
        relate.Neighbors(k=2, queue=7),
        torch.empty(0, 5),
        torch.empty(0, dtype=torch.int64),
        0,
    )
    for step, rows in enumerate(passes(8)):
        Z = torch.randn(8, 5) + 9 * torch.nn.functional.one_hot(rows % 5, 5).repeat(
            2, 1
        )  # near what it was before
        G, means = maker(Batch(rows, torch.zeros(4), 2, 3), Z), Z.view(2, 4, 5).mean(0)
        if step == 0:
            assert G.support is None
            assert_close(G.dense(), relation.Views(4, 2).dense())
        else:
            expected = []
            for row, mean in zip(rows, means, strict=True):
                others = seen[-7:][seen_rows[-7:] != row]
                met += len(others) < len(seen[-7:])
                expected.append(
                    others[torch.nn.functional.cosine_similarity(mean[None], others).topk(2).indices]
                )
            assert_close(G.support, torch.cat(expected))
            assert G.num_rows == 8 + 8
        seen, seen_rows = torch.cat([seen, means]), torch.cat([seen_rows, rows])
        assert {tuple(row.tolist()) for row in maker.queue[: min(7, len(seen))]} == {
            tuple(row.tolist()) for row in seen[-7:]
        }
    assert met > 5


def test_a_queue_of_too_few_others_does_not_support() -> None:
    """Of 3 originals in the queue 2 are one image: with k = 2 there is one other for it."""
    maker = relate.Neighbors(k=2, queue=3)
    for rows in ([7], [7], [5]):
        assert maker(Batch(torch.tensor(rows), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is None
    assert maker(Batch(torch.tensor([7]), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is None
    assert maker(Batch(torch.tensor([6]), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is None
    assert maker(Batch(torch.tensor([5]), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is not None


def test_a_batch_larger_than_the_queue_keeps_its_last_originals() -> None:
    maker = relate.Neighbors(k=1, queue=3)
    Z = torch.randn(8, 5)
    maker(batch(2), Z)
    assert_close(maker.queue, Z.view(2, 4, 5).mean(0)[1:])
    assert torch.equal(maker.rows, ROWS[1:])


def test_where_there_are_fewer_than_k_others_all_are_neighbours() -> None:
    Z = torch.randn(8, 3)
    assert_close(relate.Neighbors(9)(batch(), Z).dense(), torch.ones(8, 8) - torch.eye(8))
    assert (relate.Neighbors(9).fewest, relate.Neighbors(9, queue=20).fewest) == (10, 1)
    with pytest.raises(ValueError, match="k=0"):
        relate.Neighbors(0)
    with pytest.raises(ValueError, match="queue=4"):
        relate.Neighbors(4, queue=4)


@pytest.mark.parametrize("ending", ["csv", "npz"])
@pytest.mark.parametrize("normalized", [False, True])
def test_edges_induces_the_pairs_of_the_file_on_the_batch(
    ending: str, normalized: bool, tmp_path: Path
) -> None:
    pairs = np.array([[0, 3], [3, 5], [2, 4], [5, 3], [1, 2]])
    path = tmp_path / f"pairs.{ending}"
    if ending == "csv":
        np.savetxt(path, pairs, fmt="%d", delimiter=",", header="left,right", comments="")
    else:
        np.savez(path, i=pairs[:, 0], j=pairs[:, 1])
    maker = relate.Edges(str(path), normalized)
    maker.bind(LABELS)
    G = maker(batch(2), torch.randn(8, 3)).dense()
    listed = {frozenset(pair) for pair in pairs.tolist()}
    expected = torch.zeros(8, 8)
    for r in range(8):
        for s in range(8):
            i, j = int(ROWS[r % 4]), int(ROWS[s % 4])
            expected[r, s] = float(r != s and (i == j or frozenset((i, j)) in listed))
    d = expected.sum(1)
    assert_close(G, expected / (d[:, None] * d).sqrt() if normalized else expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n0,1\n2,9\n", "indices from 0 to 5, not 0 to 9"),
        ("a,b\n1,1\n", "paired with itself"),
        ("a,b,c\n1,2,3\n", "3 columns in the header and 3 below, where two"),
        ("a,b\n0,1,2\n3,4,5\n", "2 columns in the header and 3 below, where two"),
        ("a,b\n0,1,2\n3,4\n", "2 columns in the header and 3 below, where two"),
        ("a,b\n0,1\n3,4,5\n", "Expected 2 fields in line 3, saw 3"),
        ("a,b,c\n0,1\n", "3 columns in the header and 2 below"),
        ("a\n1\n", "1 columns in the header and 1 below"),
        ("0,1\n2,3\n", "needs a header line, such as i,j, and the first line is 0,1"),
        ("1,1\n2,3\n", "needs a header line"),
        ("a,b\n0.5,1\n", "whole numbers, not float64"),
        ("", "No columns"),
    ],
)
def test_a_file_of_pairs_that_does_not_fit_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(Refused, match=message):
        relate.Edges(str(tmp_path / "pairs.csv")).bind(LABELS)


def test_a_missing_or_broken_file_of_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not a file: give a CSV"):
        relate.Edges(None).bind(LABELS)
    (tmp_path / "pairs.npz").write_text("not an archive")
    with pytest.raises(Refused, match=r"relation\.path="):
        relate.Edges(str(tmp_path / "pairs.npz")).bind(LABELS)
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(Refused, match=r"relation\.path="):
        relate.Edges(str(tmp_path / "other.npz")).bind(LABELS)


def test_pairs_among_some_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("a,b\n0,3\n3,0\n3,5\n2,4\n")
    path = str(tmp_path / "pairs.csv")
    for maker in (relate.Edges(path), relate.Noisy("edges", path=path)):
        maker.bind(LABELS)
        assert maker.listed(ROWS) == 2
        assert maker.listed(torch.tensor([0, 1, 2])) == 0
    assert relate.Views().listed(ROWS) is relate.Noisy().listed(ROWS) is None


def bases(folder: Path) -> dict[str, tuple[relate.Noisy, BatchRelation]]:
    """Noisy relations of p = 0, and what they are then to be."""
    (folder / "pairs.csv").write_text("a,b\n0,3\n3,5\n2,4\n")
    path = str(folder / "pairs.csv")
    return {
        "views": (relate.Noisy("views", 0), relate.Views()),
        "labels": (relate.Noisy("labels", 0, normalized=True), relate.Labels(True)),
        "neighbors": (relate.Noisy("neighbors", 0, k=2), relate.Neighbors(2)),
        "edges": (relate.Noisy("edges", 0, path=path, normalized=True), relate.Edges(path, True)),
    }


@pytest.mark.parametrize("of", ["views", "labels", "neighbors", "edges"])
def test_noisy_takes_any_relation_with_its_settings(of: str, tmp_path: Path) -> None:
    noisy, plain = bases(tmp_path)[of]
    Z = torch.randn(12, 3)
    for maker in (noisy, plain):
        maker.bind(LABELS)
    assert_close(noisy(batch(3), Z).dense(), plain(batch(3), Z).dense())
    for name in ("needs_labels", "depends_on_embeddings", "fewest"):
        assert getattr(noisy, name) == getattr(plain, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "noisy"}, "of=noisy is not one of: views, labels, neighbors, edges"),
        ({"of": "views", "k": 3}, r"of=views takes no k \(settings: none\)"),
        ({"of": "neighbors", "path": "x"}, r"of=neighbors takes no path \(settings: k, queue\)"),
        ({"of": "neighbors", "k": 0}, "k=0"),
        (
            {"of": "neighbors", "queue": 9},
            "queue=9: what a queue holds cannot be rewired; set queue=0, or use relation=neighbors",
        ),
    ],
)
def test_what_noisy_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relate.Noisy(**settings)


def test_noisy_rewires_each_batch_anew_and_from_its_seed() -> None:
    rows = torch.arange(6)
    Z = torch.randn(12, 3)
    labels = relate.Labels()(batch(2, rows), Z).dense()
    makers = [relate.Noisy("labels", 0.5, seed) for seed in (0, 0, 1)]
    for maker in makers:
        maker.bind(LABELS)
    first, again, other = (maker(batch(2, rows), Z).dense() for maker in makers)
    assert_close(first, again)
    assert first.sum() == labels.sum()
    assert (first != other).any()
    assert (makers[0](batch(2, rows), Z).dense() != first).any()


def test_a_repeatable_relation_depends_on_its_batch_alone() -> None:
    Z, other = torch.randn(8, 3), torch.randn(8, 3)
    noisy, queue = relate.Noisy("neighbors", 0.5), relate.Neighbors(queue=8)
    noisy.bind(LABELS)
    for maker in (noisy.repeatable(), queue.repeatable()):
        first = maker(batch(2), Z).dense()
        maker(batch(2), other)
        assert_close(maker(batch(2), Z).dense(), first)
        assert not maker.reaches_beyond
    fresh = relate.Noisy("neighbors", 0.5)
    fresh.bind(LABELS)
    assert_close(noisy(batch(2), Z).dense(), fresh(batch(2), Z).dense())  # nothing was drawn from it
