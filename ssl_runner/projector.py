"""Projectors: features (B, width of the backbone) -> embeddings Z (B, K). Used only in training."""

from torch import nn


def mlp(features: int, width: int, depth: int, K: int) -> nn.Module:
    """MLP with `depth` linear layers without bias; batch norm and ReLU follow all but the last."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, K, bias=False))


def linear(features: int, K: int) -> nn.Module:
    """One linear layer. On frozen features every loss has a closed-form optimum for it."""
    return nn.Linear(features, K)


def identity(features: int) -> nn.Module:
    """No projector: the loss acts on the features, so K equals their width."""
    return nn.Identity()
