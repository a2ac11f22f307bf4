"""The trained model: a backbone and a projector, images (N, C, H, W) -> features (N, width) -> Z (N, K)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssl_runner.backbone import Backbone


class SSLModel(nn.Module):
    """A backbone followed by a projector.

    The loss is a function of the embeddings Z; probes and the exported weights use the backbone's features.
    Inputs are converted to `memory_format` before the forward pass of a training step (channels-last
    convolutions are faster).
    """

    def __init__(self, backbone: Backbone, projector: nn.Module, channels_last: bool = False):
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.K = output_width(projector, backbone.width)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings Z (N, K)."""
        return self.projector(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features (N, width)."""
        return self.backbone(x).flatten(1)


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks in eval mode and restore every submodule's own mode on exit."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def output_width(projector: nn.Module, features: int) -> int:
    """Number of columns of the projector's output for inputs (N, features)."""
    weight = next(projector.parameters(), None)
    if weight is None:
        return features
    with eval_mode(projector):
        return projector(torch.zeros(1, features, device=weight.device)).shape[1]


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
