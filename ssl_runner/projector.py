"""The projector: features (B, width of the backbone) -> embeddings Z (B, K), used in training only."""

from torch import nn


def mlp(features: int, width: int, depth: int, K: int) -> nn.Module:
    """`depth` linear layers, the last without bias; batch norm and ReLU after each of the others."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, K, bias=False))


def linear(features: int, K: int) -> nn.Module:
    """One linear layer: on frozen features, what every loss has a closed form for."""
    return nn.Linear(features, K)


def identity(features: int) -> nn.Module:
    """No projector: the loss acts on the features, and K is their width."""
    return nn.Identity()
