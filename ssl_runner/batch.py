"""What a relation is built from: the images of one batch."""

from dataclasses import dataclass

from torch import Tensor


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
