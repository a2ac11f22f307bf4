"""Positives by random walks on the graph of nearest neighbours in the batch."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from ssl_runner.batch import Batch
from ssl_runner.device import to_device
from ssl_runner.relation import derived, operators
from ssl_runner.relation.builders import FromNeighbors
from ssl_runner.relation.nearest import nearest_of_other_images


class FromWalks(FromNeighbors):
    """Views of the same image are positives, and so are an image and the end of a random walk from it.

    A walk goes from an image to one of its k nearest neighbours in the batch (`FromNeighbors`), drawn
    uniformly, `steps` times. One walk starts from every image of every batch. An image to which its own walk
    returns gets no positive from it. Over many batches, images i and j are positives with the probability
    1 - (1 - P_ij)(1 - P_ji), with P the power `steps` of the transition matrix.

    Pairing by random walks is the idea of SAG-VICReg (Simai et al. 2025, arXiv:2506.18104). Its affinities,
    weights and other additions to VICReg are not part of this relation.

    The walks are drawn on the CPU from a generator seeded with `seed`, which is part of the state_dict.
    Raises ValueError for k < 1 or steps < 1.
    """

    capturable = False

    def __init__(self, k: int = 5, steps: int = 2, seed: int = 0, normalized: bool = False):
        if steps < 1:
            raise ValueError(f"steps={steps}: expected steps >= 1; give the length of a walk")
        super().__init__(k, normalized=normalized)
        self.steps, self.frozen = steps, False
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def in_batch(self, embeddings: Tensor, batch: Batch) -> operators.Relation:
        n, k, device = len(embeddings), min(self.k, len(embeddings) - 1), embeddings.device
        images = torch.arange(n, device=device)
        nearest = nearest_of_other_images(embeddings, embeddings, k, images, images)
        generator = self.generator.clone_state() if self.frozen else self.generator
        choices = to_device(torch.randint(k, (self.steps, n), generator=generator, device="cpu"), device)
        ends = images
        for choice in choices:
            ends = nearest[ends, choice]
        return derived.ViewExpanded(operators.KNearest(ends[:, None]), batch.V)

    def frozen_copy(self) -> "FromWalks":
        frozen = copy(self)
        frozen.frozen, frozen.generator = True, self.generator.clone_state()
        return frozen

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
