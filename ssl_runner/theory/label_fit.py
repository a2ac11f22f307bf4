"""How much of the labels an augmentation's relation can expose, over a whole data set.

The views of one batch say nothing about this: any K of the n leading eigenvectors of G are optimal, and their
label energy is K / (n - 1) on average for all images and augmentations. Over a data set, and for functions of
fixed features phi, the ties are broken. The directions of largest correlation between views,

    X'GX w = rho X'DX w,    X: features of views,    largest rho

approximate the leading eigenfunctions of the augmentation graph of the population (HaoChen et al. 2021,
arXiv:2106.04156), which the losses learn first. They expose the labels to the extent that the labels are a
linear function of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_runner.theory.linear import eigenpairs
from ssl_runner.theory.moments import CentredMoments


@dataclass
class LabelFit:
    """Directions k = 1 ... K of largest correlation between views.

    rho     (K,) correlation of two views of an image along direction k, descending
    energy  (K,) share of the variance of the one-hot labels in the span of the first k directions, corrected
            for chance: 0 on average for directions that do not depend on the labels, 1 for all of it
    """

    rho: Tensor
    energy: Tensor


def label_fit(moments: CentredMoments, features: Tensor, y: Tensor, K: int) -> LabelFit:
    """The fit of up to K directions to the labels of held-out images.

    moments   of the features of views, with the relation `views`
    features  (n, D) of n other images without augmentation, float
    y         (n,) their labels, integers >= 0

    A random subspace of k dimensions holds k / (n - 1) of the variance; E is scaled so that this is 0.
    """
    K = min(K, features.shape[1], len(features) - 2)
    rho, W = eigenpairs(moments.XGX, moments.XDX, K, ridge=0.0)
    directions = (features.double() - features.double().mean(0)) @ W
    Y = nn.functional.one_hot(y).double()
    Y = Y - Y.mean(0)
    Q = torch.linalg.qr(directions / directions.norm(dim=0).clamp(min=1e-300)).Q
    energy = (Q.T @ Y).square().sum(1).cumsum(0) / Y.square().sum()
    chance = torch.arange(1, len(energy) + 1, dtype=torch.float64) / (len(y) - 1)
    return LabelFit(rho, (energy - chance) / (1 - chance))


class RandomFourier(nn.Module):
    """Random Fourier features (Rahimi & Recht 2007) of pixels: X (n, C, H, W) -> (n, D).

    Inner products approximate a Gaussian kernel whose width is the median distance between the images given.
    """

    def __init__(self, images: Tensor, D: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pixels = images.flatten(1).cpu()
        width = float(torch.pdist(pixels).median())
        W = torch.randn(pixels.shape[1], D, generator=generator) / max(width, 1e-30)
        self.register_buffer("W", W.to(images.device))
        self.register_buffer("phase", (2 * math.pi * torch.rand(D, generator=generator)).to(images.device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x.flatten(1) @ self.W + self.phase)
