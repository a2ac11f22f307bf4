"""Batched augmentation: uint8 images -> V normalised views of each."""

from ssl_runner.views.policy import Augment, Policy, normalize, to_unit

__all__ = ["Augment", "Policy", "normalize", "to_unit"]
