"""Baselines to compare a backbone with: projections of the pixels, as networks without training."""

import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from ssl_runner.data.dataset import DataSet
from ssl_runner.probe.protocol import extract


def principal_components(data: DataSet, K: int) -> nn.Module:
    """PCA of the pixels of the training images, as a network.

    Images (B, C, H, W) -> coordinates along the first K principal components (B, K).
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    mean = X.mean(0)
    X = X - mean
    directions = torch.linalg.eigh((X.T @ X).cpu().double()).eigenvectors.flip(1)[:, :K]
    return _projection(directions.to(X), mean)


def linear_discriminants(data: DataSet) -> nn.Module:
    """Linear discriminant analysis (scikit-learn) of the pixels of the training images, as a network.

    Images (B, C, H, W) -> (B, classes - 1). The supervised optimum of a linear model.
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    fitted = LinearDiscriminantAnalysis(solver="svd").fit(
        X.cpu().double().numpy(), data.train.y.cpu().numpy()
    )
    return _projection(torch.from_numpy(fitted.scalings_).to(X), torch.from_numpy(fitted.xbar_).to(X))


def _projection(directions: Tensor, mean: Tensor) -> nn.Module:
    """Network for images (B, C, H, W) -> (pixels - mean) @ directions, (B, K).

    directions (C H W, K), mean (C H W,).
    """
    matrix = nn.Linear(*directions.shape, device=directions.device)  # type: ignore[misc]
    with torch.no_grad():
        matrix.weight.copy_(directions.T)
        matrix.bias.copy_(-mean @ directions)
    return nn.Sequential(nn.Flatten(), matrix)
