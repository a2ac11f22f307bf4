"""Builders of the relation of a batch, compared with their definition row by row."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssl_runner import relation
from ssl_runner.batch import Batch
from ssl_runner.errors import UsageError
from ssl_runner.relation import builders, nearest
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.relation.walks import FromWalks

LABELS = torch.tensor([0, 1, 0, 2, 1, 1])
INDICES = torch.tensor([3, 0, 5, 1])


def batch(V: int = 2, indices: Tensor = INDICES) -> Batch:
    return Batch(indices, LABELS[indices], V, 3)


def test_views_and_labels_match_definition() -> None:
    Z = torch.randn(12, 5)
    assert_close(builders.FromViews()(batch(3), Z).dense(), relation.Views(4, 3).dense())
    assert_close(builders.FromViews(True)(batch(3), Z).dense(), relation.Views(4, 3, True).dense())
    labels = LABELS[INDICES].repeat(3)
    assert_close(
        builders.FromLabels()(batch(3), Z).dense(), ((labels[:, None] == labels).float() - torch.eye(12))
    )


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_neighbors_in_batch_matches_definition(k: int, V: int) -> None:
    Z = torch.randn(V * 4, 5)
    G = builders.FromNeighbors(k)(batch(V), Z).dense()
    means = torch.nn.functional.normalize(Z.view(V, 4, 5).mean(0))
    nearest = [
        [j for j in sorted(range(4), key=lambda j: -float(means[i] @ means[j])) if j != i][:k]
        for i in range(4)
    ]
    for r in range(4 * V):
        for s in range(4 * V):
            i, j = r % 4, s % 4
            assert G[r, s] == float(r != s and (i == j or j in nearest[i] or i in nearest[j]))


def shuffled_batches(n: int) -> Iterator[Tensor]:
    """Indices of ten batches of 4, from epochs over the images 0 ... n - 1, each in its own random order."""
    order = torch.cat([torch.randperm(n) for _ in range(40 // n)])
    yield from order.split(4)


def test_neighbors_do_not_depend_on_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, of_keys = torch.randn(50, 6), torch.randn(30, 6), torch.arange(30) % 20
    images = torch.arange(50)
    whole = nearest.nearest_of_other_images(queries, keys, 4, images, of_keys)
    monkeypatch.setattr(nearest, "BLOCK_ELEMENTS", 100)  # 3 rows of 30 similarities
    assert nearest.nearest_of_other_images(queries, keys, 4, images, of_keys).equal(whole)
    assert not (of_keys[whole] == images[:, None]).any()


def test_neighbors_queue_holds_last_images_and_supports_with_nearest_other_images() -> None:
    """In five epochs over 8 images, a queue of 7 often holds an earlier embedding of the same image."""
    builder, own_in_queue = builders.FromNeighbors(k=2, queue=7), 0
    seen, seen_indices = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    for step, indices in enumerate(shuffled_batches(8)):
        # embeddings of one image stay close to each other from epoch to epoch
        Z = torch.randn(8, 5) + 9 * torch.nn.functional.one_hot(indices % 5, 5).repeat(2, 1)
        G, means = builder(Batch(indices, torch.zeros(4), 2, 3), Z), Z.view(2, 4, 5).mean(0)
        if step == 0:
            assert G.support is None
            assert_close(G.dense(), relation.Views(4, 2).dense())
        else:
            expected = []
            for index, mean in zip(indices, means, strict=True):
                others = seen[-7:][seen_indices[-7:] != index]
                own_in_queue += len(others) < len(seen[-7:])
                similarity = torch.nn.functional.cosine_similarity(mean[None], others)
                expected.append(others[similarity.topk(2).indices])
            assert_close(G.support, torch.cat(expected))
            assert G.num_rows == 8 + 8
        seen, seen_indices = torch.cat([seen, means]), torch.cat([seen_indices, indices])
        queued = {tuple(row.tolist()) for row in builder.queue[: min(7, len(seen))]}
        assert queued == {tuple(row.tolist()) for row in seen[-7:]}
    assert own_in_queue > 5


def test_neighbors_queue_with_fewer_than_k_other_images_adds_no_support() -> None:
    """If 2 of the 3 queue entries are of one image, that image has a single neighbour, fewer than k = 2."""
    builder = builders.FromNeighbors(k=2, queue=3)
    for index in (7, 7, 5, 7, 6):
        assert builder(Batch(torch.tensor([index]), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is None
    assert builder(Batch(torch.tensor([5]), torch.zeros(1), 2, 3), torch.randn(2, 5)).support is not None


def test_neighbors_queue_keeps_last_images_of_larger_batch() -> None:
    builder = builders.FromNeighbors(k=1, queue=3)
    Z = torch.randn(8, 5)
    builder(batch(2), Z)
    assert_close(builder.queue, Z.view(2, 4, 5).mean(0)[1:])
    assert torch.equal(builder.indices, INDICES[1:])


def test_neighbors_k_above_batch_size_relates_all_images() -> None:
    Z = torch.randn(8, 3)
    assert_close(builders.FromNeighbors(9)(batch(), Z).dense(), torch.ones(8, 8) - torch.eye(8))
    assert builders.FromNeighbors(9).min_batch_size == 10
    assert builders.FromNeighbors(9, queue=20).min_batch_size == 1


def test_neighbors_rejects_invalid_k_and_queue() -> None:
    with pytest.raises(ValueError, match="k=0"):
        builders.FromNeighbors(0)
    with pytest.raises(ValueError, match="queue=4"):
        builders.FromNeighbors(4, queue=4)


@pytest.mark.parametrize("ending", ["csv", "npz"])
@pytest.mark.parametrize("normalized", [False, True])
def test_edges_matches_pairs_of_file_within_batch(ending: str, normalized: bool, tmp_path: Path) -> None:
    pairs = np.array([[0, 3], [3, 5], [2, 4], [5, 3], [1, 2]])
    path = tmp_path / f"pairs.{ending}"
    if ending == "csv":
        np.savetxt(path, pairs, fmt="%d", delimiter=",", header="left,right", comments="")
    else:
        np.savez(path, i=pairs[:, 0], j=pairs[:, 1])
    builder = builders.FromEdges(str(path), normalized)
    builder.bind(LABELS)
    G = builder(batch(2), torch.randn(8, 3)).dense()
    listed = {frozenset(pair) for pair in pairs.tolist()}
    expected = torch.zeros(8, 8)
    for r in range(8):
        for s in range(8):
            i, j = int(INDICES[r % 4]), int(INDICES[s % 4])
            expected[r, s] = float(r != s and (i == j or frozenset((i, j)) in listed))
    d = expected.sum(1)
    assert_close(G, expected / (d[:, None] * d).sqrt() if normalized else expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n0,1\n2,9\n", "i, j from 0 to 9: expected indices from 0 to 5"),
        ("a,b\n1,1\n", "i=j=1: expected pairs of different rows"),
        ("a,b,c\n1,2,3\n", "3 columns in the header and 3 in the rows: expected 2"),
        ("a,b\n0,1,2\n3,4,5\n", "2 columns in the header and 3 in the rows: expected 2"),
        ("a,b\n0,1,2\n3,4\n", "2 columns in the header and 3 in the rows: expected 2"),
        ("a,b\n0,1\n3,4,5\n", "Expected 2 fields in line 3, saw 3"),
        ("a,b,c\n0,1\n", "3 columns in the header and 2 in the rows"),
        ("a\n1\n", "1 column in the header and 1 in the rows"),
        ("0,1\n2,3\n", "first line 0,1: expected column names, such as i,j; add a header line"),
        ("1,1\n2,3\n", "first line 1,1.*: expected column names"),
        ("a,b\n0.5,1\n", "indices of float64: expected integers"),
        ("", "No columns"),
    ],
)
def test_edges_rejects_invalid_csv(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(UsageError, match=message):
        builders.FromEdges(str(tmp_path / "pairs.csv")).bind(LABELS)


def test_edges_rejects_missing_or_corrupt_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"relation\.path=None: expected an existing file; give a CSV"):
        builders.FromEdges(None).bind(LABELS)
    (tmp_path / "pairs.npz").write_text("not an archive")
    with pytest.raises(UsageError, match=r"relation\.path="):
        builders.FromEdges(str(tmp_path / "pairs.npz")).bind(LABELS)
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(UsageError, match=r"relation\.path="):
        builders.FromEdges(str(tmp_path / "other.npz")).bind(LABELS)


def test_count_pairs_counts_pairs_among_given_images(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("a,b\n0,3\n3,0\n3,5\n2,4\n")
    path = str(tmp_path / "pairs.csv")
    for builder in (builders.FromEdges(path), builders.Rewired(builders.FromEdges(path))):
        builder.bind(LABELS)
        assert builder.count_pairs(INDICES) == 2
        assert builder.count_pairs(torch.tensor([0, 1, 2])) == 0
    for builder in (builders.FromViews(), builders.Rewired(builders.FromViews())):
        assert builder.count_pairs(INDICES) is None


def rewired_without_noise(folder: Path) -> dict[str, tuple[RelationBuilder, RelationBuilder]]:
    """Rewired relations with rewire_fraction = 0, each with the relation that it must equal."""
    (folder / "pairs.csv").write_text("a,b\n0,3\n3,5\n2,4\n")
    path = str(folder / "pairs.csv")
    FromViews, FromLabels, Rewired = builders.FromViews, builders.FromLabels, builders.Rewired
    FromNeighbors, FromEdges = builders.FromNeighbors, builders.FromEdges
    return {
        "views": (Rewired(FromViews(), 0), FromViews()),
        "labels": (Rewired(FromLabels(), 0, normalized=True), FromLabels(True)),
        "neighbors": (Rewired(FromNeighbors(2), 0), FromNeighbors(2)),
        "edges": (Rewired(FromEdges(path), 0, normalized=True), FromEdges(path, True)),
        "rewired": (Rewired(Rewired(FromLabels(), 0), 0), FromLabels()),
    }


@pytest.mark.parametrize("base", ["views", "labels", "neighbors", "edges", "rewired"])
def test_rewired_with_fraction_zero_matches_base_relation(base: str, tmp_path: Path) -> None:
    rewired, plain = rewired_without_noise(tmp_path)[base]
    Z = torch.randn(12, 3)
    for builder in (rewired, plain):
        builder.bind(LABELS)
    assert_close(rewired(batch(3), Z).dense(), plain(batch(3), Z).dense())
    for name in ("needs_labels", "depends_on_embeddings", "min_batch_size"):
        assert getattr(rewired, name) == getattr(plain, name)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (builders.FromNeighbors(queue=9), "expected a relation without a queue"),
        (builders.FromLabels(normalized=True), "base.normalized=true: expected false"),
        (builders.Rewired(builders.FromLabels(), normalized=True), "base.normalized=true: expected false"),
    ],
)
def test_rewired_rejects_base_with_queue_or_weights(base: RelationBuilder, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        builders.Rewired(base)


def test_rewired_changes_every_batch_and_is_seeded() -> None:
    full, Z = batch(2, torch.arange(6)), torch.randn(12, 3)
    labels = builders.FromLabels()(full, Z).dense()
    first, same_seed, other_seed = (builders.Rewired(builders.FromLabels(), 0.5, s) for s in (0, 0, 1))
    for builder in (first, same_seed, other_seed):
        builder.bind(LABELS)
    G = first(full, Z).dense()
    assert G.sum() == labels.sum()
    assert_close(same_seed(full, Z).dense(), G)
    assert (other_seed(full, Z).dense() != G).any()
    assert (first(full, Z).dense() != G).any()


@pytest.mark.parametrize(
    "build",
    [
        lambda: builders.FromNeighbors(k=2, queue=7),
        lambda: builders.Rewired(builders.FromLabels()),
        lambda: builders.Rewired(builders.Rewired(builders.FromLabels()), seed=1),
    ],
    ids=["queue", "rewired", "rewired twice"],
)
def test_state_dict_continues_the_sequence_of_relations(build: Callable[[], RelationBuilder]) -> None:
    batches = [(batch(2), torch.randn(8, 5)) for _ in range(6)]
    first, second = build(), build()
    for builder in (first, second):
        builder.bind(LABELS)
    for arguments in batches[:3]:
        first(*arguments)
    second.load_state_dict(deepcopy(first.state_dict()))
    for arguments in batches[3:]:
        G, resumed = first(*arguments), second(*arguments)
        assert_close(resumed.dense(), G.dense())
        assert_close(resumed.support, G.support)


@pytest.mark.parametrize(
    "builder",
    [
        builders.FromNeighbors(queue=8),
        builders.Rewired(builders.FromNeighbors(), 0.5),
        builders.Rewired(builders.Rewired(builders.FromLabels())),
    ],
    ids=["queue", "rewired", "rewired twice"],
)
def test_frozen_copy_gives_one_relation_per_batch_and_leaves_the_original(builder: RelationBuilder) -> None:
    Z, other = torch.randn(8, 3), torch.randn(8, 3)
    builder.bind(LABELS)
    before = deepcopy(builder.state_dict())
    frozen = builder.frozen_copy()
    first = frozen(batch(2), Z).dense()
    frozen(batch(2), other)
    assert_close(frozen(batch(2), Z).dense(), first)
    assert not frozen.uses_memory
    assert_close(builder.state_dict(), before)


def label_file(folder: Path, kind: str, Y: np.ndarray) -> str:
    path = folder / f"labels.{kind}"
    if kind == "npz":
        np.savez(path, Y=Y)
    else:
        np.savetxt(path, Y, fmt="%d", delimiter=",", header="cat,dog,red", comments="")
    return str(path)


SEVERAL = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["npz", "csv"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_labels_from_file_match_definition(
    tmp_path: Path, kind: str, weighted: bool, normalized: bool
) -> None:
    build = builders.FromLabels(normalized, label_file(tmp_path, kind, SEVERAL), weighted)
    build.bind(LABELS)
    rows = [set(SEVERAL[i].nonzero()[0]) for i in INDICES] * 3
    shared = [[float(i != j) * len(a & b) for j, b in enumerate(rows)] for i, a in enumerate(rows)]
    images = np.arange(12) % 4
    same_image = torch.from_numpy(images[:, None] == images).float().fill_diagonal_(0)
    expected = torch.tensor(shared) if weighted else (torch.tensor(shared) + same_image > 0).float()
    if normalized:
        scale = expected.sum(1).clamp(min=1).rsqrt()
        expected = scale[:, None] * expected * scale
    assert_close(build(batch(3), torch.randn(12, 5)).dense(), expected)


@pytest.mark.parametrize(
    ("Y", "message"),
    [
        (SEVERAL[:5], r"labels of shape \(5, 3\): expected \(6, C\)"),
        (2 * SEVERAL, "labels: expected 0 or 1 in every place"),
        (SEVERAL[:, 0], r"labels of shape \(6,\): expected \(6, C\)"),
    ],
)
def test_labels_from_file_refuse_other_content(tmp_path: Path, Y: np.ndarray, message: str) -> None:
    build = builders.FromLabels(path=label_file(tmp_path, "npz", Y))
    with pytest.raises(UsageError, match=message):
        build.bind(LABELS)


def test_images_without_a_label_in_the_file_are_refused(tmp_path: Path) -> None:
    build = builders.FromLabels(path=label_file(tmp_path, "csv", SEVERAL * (np.arange(6) != 5)[:, None]))
    build.bind(LABELS)
    build.check_images(torch.arange(5))
    with pytest.raises(UsageError, match="1 of the 6 pretraining images have no label"):
        build.check_images(torch.arange(6))
    with pytest.raises(ValueError, match="weighted=true: expected relation"):
        builders.FromLabels(weighted=True)


@pytest.mark.parametrize(("k", "steps"), [(1, 1), (2, 1), (2, 3)])
def test_ends_of_walks_have_the_probabilities_of_the_transition_matrix(k: int, steps: int) -> None:
    """The relation joins i and j with the probability 1 - (1 - P_ij)(1 - P_ji), P a power of the matrix."""
    n, draws = 6, 2000
    Z = torch.randn(2 * n, 4)
    own = Batch(torch.arange(n), torch.zeros(n, dtype=torch.long), 2, 1)
    means = torch.nn.functional.normalize(Z.view(2, n, 4).mean(0))
    similarity = (means @ means.T).fill_diagonal_(-2)
    step = torch.zeros(n, n).scatter_(1, similarity.topk(k).indices, 1 / k)
    P = torch.linalg.matrix_power(step, steps)
    build = FromWalks(k, steps, seed=3)
    found = sum(build(own, Z).A.dense() for _ in range(draws)) / draws
    expected = (1 - (1 - P) * (1 - P.T)).fill_diagonal_(0)
    assert_close(found, expected, rtol=0, atol=4 * 0.5 / draws**0.5)


def test_walks_resume_exactly_and_a_frozen_copy_repeats_them() -> None:
    build, Z = FromWalks(2, 2), torch.randn(8, 4)
    build(batch(), Z)
    state, frozen = deepcopy(build.state_dict()), build.frozen_copy()
    following = [build(batch(), Z).dense() for _ in range(5)]
    assert torch.equal(frozen(batch(), Z).dense(), frozen(batch(), Z).dense())
    resumed = FromWalks(2, 2, seed=1)
    resumed.load_state_dict(state)
    assert all(torch.equal(resumed(batch(), Z).dense(), G) for G in following)
    assert len({tuple(G.flatten().tolist()) for G in following}) > 1
    with pytest.raises(ValueError, match="steps=0"):
        FromWalks(steps=0)
