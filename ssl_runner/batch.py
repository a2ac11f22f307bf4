"""The images of one batch, from which a relation is built, and their views."""

from dataclasses import dataclass

from torch import Tensor

ViewTensors = Tensor | list[Tensor]  # X (V n, C, h, w), or one tensor per size if the views have several


def per_size(X: ViewTensors) -> list[Tensor]:
    """Return the views as a list with one tensor per size."""
    return X if isinstance(X, list) else [X]


@dataclass
class Batch:
    """A batch of n images, V views of each.

    indices (n,) int64, on the host: the images' indices in the data set. labels (n,) int64, on the device: -1
    for an unlabelled image. num_classes: the number of classes of the data set.
    """

    indices: Tensor
    labels: Tensor
    V: int
    num_classes: int
