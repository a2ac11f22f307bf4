"""Batched augmentation: uint8 images -> V normalised views of each."""

from ssl_runner.views.augment import IMAGE_FORMAT, Augment, ViewFormat, normalize, to_unit
from ssl_runner.views.policy import Policy

__all__ = ["IMAGE_FORMAT", "Augment", "Policy", "ViewFormat", "normalize", "to_unit"]
