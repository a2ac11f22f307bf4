"""Made images in the shape of a data set that is not at hand, to measure time and memory of whole runs.

ssl-run dataset=stl10 dataset._target_=benchmarks.made.images has images of STL-10's size and splits.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ssl_runner.data.dataset import Source


def images(
    n_train: int = 5000,
    n_test: int = 8000,
    n_unlabeled: int = 2000,
    side: int = 96,
    classes: int = 10,
    **_: object,
) -> Source:
    """Images (3, side, side) of 6 x 6 random patches, bicubic, plus noise. A class shares 30 % of them.

    Options of the data set that is imitated, such as `root`, are ignored.
    """
    generator = torch.Generator().manual_seed(0)
    total = n_train + n_test + n_unlabeled
    labels = torch.arange(total) % classes
    shared = torch.rand(classes, 3, 6, 6, generator=generator)
    pixels = torch.empty(total, 3, side, side, dtype=torch.uint8)
    for rows in torch.arange(total).split(500):
        patches = 0.3 * shared[labels[rows]] + 0.7 * torch.rand(len(rows), 3, 6, 6, generator=generator)
        x = F.interpolate(patches, (side, side), mode="bicubic")
        x += 0.1 * torch.randn(x.shape, generator=generator)
        pixels[rows] = (255 * x.clamp(0, 1)).to(torch.uint8)
    labels[n_train + n_test :] = -1
    train, test, unlabeled = np.split(np.arange(total), [n_train, n_train + n_test])
    return Source(pixels, labels, [str(c) for c in range(classes)], train, test, unlabeled)
