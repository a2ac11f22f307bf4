"""Seeded, class-balanced subsets of indices."""

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a random permutation (n,) that cycles through the classes of labels (n,).

    Every prefix of it is as class-balanced as possible.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(labels[shuffled]).groupby(labels[shuffled]).cumcount().to_numpy()
    return shuffled[np.argsort(turn, kind="stable")]


def balanced_size(number: int, images: int, classes: int) -> int:
    """At most `number` of so many images: a multiple of the number of classes, if it is not smaller."""
    number = min(number, images)
    return number - number % classes if number >= classes > 0 else number


def hold_out(
    rows: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Split rows (n,), indices of labels, into those to keep and a held-out fraction, stratified by class.

    Every class keeps an image, so a class with one image is kept whole. If fewer images are held out than
    there are classes, they belong to different classes. Returns None if no image can be held out, or if a
    class would keep none.
    """
    y = labels[rows]
    sizes = np.bincount(y)
    several = sizes[y] > 1
    classes, number = int((sizes > 1).sum()), int(several.sum())
    held_out = round(fraction * number)
    if not 1 <= held_out <= number - classes:
        return None
    if held_out < classes:
        order = rows[several][balanced_order(y[several], seed)]
        kept, held = order[held_out:], order[:held_out]
    else:
        kept, held = train_test_split(
            rows[several], test_size=held_out, stratify=y[several], random_state=seed
        )
    return np.concatenate([rows[~several], kept]), held
