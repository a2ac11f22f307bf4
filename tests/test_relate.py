"""How a batch gets its relation: each maker against the definition, row by row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import relate, relation
from ssl_runner.errors import Refused
from ssl_runner.relate import Batch

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
    nearest = [[j for j in sorted(range(4), key=lambda j: -float(means[i] @ means[j])) if j != i][:k] for i in range(4)]
    for r in range(4 * V):
        for s in range(4 * V):
            i, j = r % 4, s % 4
            assert G[r, s] == float(r != s and (i == j or j in nearest[i] or i in nearest[j]))


def test_the_queue_holds_the_last_originals_and_supports_with_the_nearest() -> None:
    maker, seen = relate.Neighbors(k=2, queue=7), torch.empty(0, 5)
    for step in range(5):
        Z = torch.randn(8, 5)
        G, means = maker(batch(2), Z), Z.view(2, 4, 5).mean(0)
        if step == 0:
            assert G.support is None
            assert_close(G.dense(), relation.Views(4, 2).dense())
        else:
            cosines = torch.nn.functional.cosine_similarity(means[:, None], seen[-7:][None], dim=2)
            expected = seen[-7:][cosines.topk(2).indices].flatten(0, 1)
            assert_close(G.support, expected)
            assert G.num_rows == 8 + 8
        seen = torch.cat([seen, means])
        assert {tuple(row.tolist()) for row in maker.queue[: min(7, len(seen))]} == {tuple(row.tolist()) for row in seen[-7:]}


def test_a_batch_larger_than_the_queue_keeps_its_last_originals() -> None:
    maker = relate.Neighbors(k=1, queue=3)
    Z = torch.randn(8, 5)
    maker(batch(2), Z)
    assert_close(maker.queue, Z.view(2, 4, 5).mean(0)[1:])


def test_too_few_originals_for_the_neighbours_are_refused() -> None:
    with pytest.raises(Refused, match=r"relation\.k=4: a batch of 4 originals has 3 neighbours"):
        relate.Neighbors(4)(batch(), torch.randn(8, 3))
    with pytest.raises(ValueError, match="k=0"):
        relate.Neighbors(0)
    with pytest.raises(ValueError, match="queue=2"):
        relate.Neighbors(4, queue=2)


@pytest.mark.parametrize("ending", ["csv", "npz"])
@pytest.mark.parametrize("normalized", [False, True])
def test_edges_induces_the_pairs_of_the_file_on_the_batch(ending: str, normalized: bool, tmp_path: Path) -> None:
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
        ("a,b,c\n1,2,3\n", "3 columns where two"),
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
    with pytest.raises(ValueError, match="of=neighbors is not one of: views, labels"):
        relate.Noisy("neighbors")
