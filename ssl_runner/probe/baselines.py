"""Baselines to compare a backbone with: projections of the pixels, as networks without training."""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from ssl_runner.data.dataset import DataSet
from ssl_runner.errors import UsageError
from ssl_runner.probe.protocol import extract
from ssl_runner.probe.row_space import RowSpace, column_blocks, float64, moments


class NoDiscriminants(UsageError):
    """The images have no linear discriminants: classes without variance within, or with equal means."""


def principal_components(data: DataSet, K: int) -> nn.Module:
    """PCA of the pixels of the training images, as a network.

    Images (B, C, H, W) -> coordinates along the first K principal components (B, K). With fewer images than
    pixels there are at most as many components as the rank of the centred images.
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    mean = X.mean(0)
    if len(X) < X.shape[1]:
        rows = RowSpace(X, float64(mean), float64(torch.ones_like(mean)))
        directions = rows.to_features(torch.eye(len(rows.values), device="cpu")[:, :K])
    else:
        X = X - mean
        directions = torch.linalg.eigh(float64(X.T @ X)).eigenvectors.flip(1)[:, :K]
    return _projection(directions.to(X), mean)


def linear_discriminants(data: DataSet) -> nn.Module:
    """Linear discriminant analysis (scikit-learn) of the pixels of the training images, as a network.

    Images (B, C, H, W) -> (B, classes - 1). The supervised optimum of a linear model. Raises NoDiscriminants.
    """
    X = extract(nn.Flatten(), data.train, data.mean, data.std)
    check_variances(X, data.train.y)
    if len(X) < X.shape[1]:
        return _projection(*discriminants_of_few(X, data.train.y))
    fitted = LinearDiscriminantAnalysis(solver="svd").fit(
        X.cpu().double().numpy(), data.train.y.cpu().numpy()
    )
    return _projection(torch.from_numpy(fitted.scalings_).to(X), torch.from_numpy(fitted.xbar_).to(X))


def check_variances(X: Tensor, y: Tensor) -> None:
    """Raise NoDiscriminants if X (n, D) with labels y (n,) has no variance within or between classes."""
    labels, y = y.unique(return_inverse=True)
    first = torch.stack([(y == label).nonzero()[0, 0] for label in range(len(labels))])
    within = any(bool((part != part[first][y]).any()) for part in column_blocks(X))
    means = torch.stack([X[y == label].mean(0) for label in range(len(labels))])
    if not within or bool((means == means[0]).all()):
        found = "equal means of all classes" if within else "equal images in every class"
        raise NoDiscriminants(
            "probe.features=lda: expected training images that differ within classes, and different class"
            f" means, found {found}; leave out lda"
        )


def discriminants_of_few(X: Tensor, y: Tensor, tol: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Discriminants (D, k) and mean (D,) of X (n, D) with labels y (n,) and n < D. Overwrites X.

    The algorithm of scikit-learn's solver "svd", with the scale of its version 1.9 (variances over n; over
    n - classes before) and its tolerance for singular values: scale by the standard deviation within classes,
    whiten within classes, then take the principal axes of the class means. The whitening uses the n x n Gram
    matrix instead of the singular vectors of X. X must have variance within and between classes.
    """
    labels, y = y.unique(return_inverse=True)
    Y = float64(F.one_hot(y, len(labels)).float())  # (n, classes)
    shares = Y.mean(0)
    means = torch.cat([Y.T @ float64(part) for part in column_blocks(X)], 1) / (len(X) * shares[:, None])
    overall = shares @ means
    X -= means.to(X)[y]
    mean, scale = moments(X, correction=0)
    scale = torch.where(scale > 0, scale, 1)
    rows = RowSpace(X, torch.zeros_like(mean), scale)
    S = (rows.values / len(X)).sqrt()
    S = S[tol < S]
    whitening = S.new_zeros(len(rows.values), len(S)).fill_diagonal_(1) / S
    W = scale[:, None] * rows.to_features(whitening)  # (D, rank within classes)
    weights = (len(X) * shares / max(len(labels) - 1, 1)).sqrt()
    between = torch.linalg.svd(weights[:, None] * ((means - overall) @ W), full_matrices=False)
    rank = int((between.S / between.S[0] > tol).sum())
    return (W @ between.Vh[:rank].T).to(X), overall.to(X)


def _projection(directions: Tensor, mean: Tensor) -> nn.Module:
    """Network for images (B, C, H, W) -> (pixels - mean) @ directions, (B, K).

    directions (C H W, K), mean (C H W,).
    """
    placement: dict[str, Any] = {"device": directions.device, "dtype": directions.dtype}
    matrix = nn.Linear(*directions.shape, **placement)
    with torch.no_grad():
        matrix.weight.copy_(directions.T)
        matrix.bias.copy_(-mean @ directions)
    return nn.Sequential(nn.Flatten(), matrix)
