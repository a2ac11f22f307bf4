"""Seeded, class-balanced subsets of indices."""

import itertools
import math

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


def number_held_out(sizes: np.ndarray, fraction: float) -> int | None:
    """The images that `hold_out` takes from classes of these sizes (C,), None if it cannot take any."""
    several = sizes[sizes > 1]
    held_out = round(fraction * int(several.sum()))
    return held_out if 1 <= held_out <= several.sum() - len(several) else None


def nearest_fraction(sizes: np.ndarray, fraction: float) -> float | None:
    """The fraction next to `fraction`, in steps of 0.01, of which `hold_out` can take images, or None."""
    several = sizes[sizes > 1]
    if not len(several):
        return None
    low, high = 1 / several.sum(), 1 - len(several) / several.sum()
    return math.ceil(100 * low) / 100 if fraction < low else math.floor(100 * high) / 100


def smallest_subset(classes: int, fraction: float) -> int:
    """The smallest number of images, balanced over the classes, of which `hold_out` can take a fraction."""
    first = max(classes + 1, int(0.5 / fraction))  # below this no image is held out
    return next(
        n for n in itertools.count(first) if number_held_out(np.bincount(np.arange(n) % classes), fraction)
    )


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
    held_out = number_held_out(sizes, fraction)
    if held_out is None:
        return None
    if held_out < (sizes > 1).sum():
        order = rows[several][balanced_order(y[several], seed)]
        kept, held = order[held_out:], order[:held_out]
    else:
        kept, held = train_test_split(
            rows[several], test_size=held_out, stratify=y[several], random_state=seed
        )
    return np.concatenate([rows[~several], kept]), held
