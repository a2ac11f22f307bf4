"""How much of the labels the relation of an augmentation can expose, over a whole data set.

A batch of views cannot show it: any K of the n leading eigenvectors of G are optimal, and the mean of their
label energy is K / (n - 1) for all images and augmentations. Over a data set, and for functions of fixed
features, the ties are broken. The directions of largest correlation between views,

    X'GX w = rho X'DX w,    X: features of views,    largest rho

approximate the leading eigenfunctions of the population augmentation graph (HaoChen et al. 2021,
arXiv:2106.04156). A linear probe on these eigenfunctions fits the labels as far as they lie in their span.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_runner.theory.linear import eigenpairs
from ssl_runner.theory.moments import CentredMoments

# Share of the mean variance that is added to X'DX. Without it the leading directions have little variance,
# and their correlations are fitted to the images. The rank correlation of the energy with the probes of
# trained networks grows with it up to 1 and is level from 1 to 1,000 (docs/theory.md).
RIDGE = 1.0
EQUAL_VIEWS = 1e-9  # share of the variance between views, below which it is rounding errors


class EqualViews(ValueError):
    """All views of an image have equal features: rho is 1 for every direction."""


@dataclass
class LabelFit:
    """Directions k = 1 ... K of largest correlation between views, penalised by the ridge.

    rho     (K,) correlation of two views of an image along direction k
    energy  (K,) share of the variance of the one-hot labels in the span of the first k directions, corrected
            for chance: 0 on average for directions that do not depend on the labels, 1 for all of it
    """

    rho: Tensor
    energy: Tensor


def label_fit(moments: CentredMoments, features: Tensor, y: Tensor, K: int, ridge: float = RIDGE) -> LabelFit:
    """The fit of up to K directions to the labels of held-out images.

    moments   of the features of views, with the relation `views`
    features  (n, D) of n other images without augmentation, float
    y         (n,) their labels, integers >= 0, of two classes or more

    A random subspace of k dimensions holds k / (n - 1) of the variance; energy is scaled so that this is 0.
    Raises EqualViews, and ValueError if all features are constant.
    """
    if (moments.XDX - moments.XGX).trace() <= EQUAL_VIEWS * moments.XDX.trace():
        raise EqualViews("equal views: expected views that differ; use other operations")
    K = min(K, features.shape[1], len(features) - 2)
    _, W = eigenpairs(moments.XGX, moments.XDX, K, ridge)
    rho = (W.T @ moments.XGX @ W).diagonal() / (W.T @ moments.XDX @ W).diagonal()
    directions = (features.double() - features.double().mean(0)) @ W
    Y = nn.functional.one_hot(y).double()
    Y = Y - Y.mean(0)
    Q = torch.linalg.qr(directions / directions.norm(dim=0).clamp(min=1e-300)).Q
    energy = (Q.T @ Y).square().sum(1).cumsum(0) / Y.square().sum()
    chance = torch.arange(1, len(energy) + 1, dtype=torch.float64) / (len(y) - 1)
    return LabelFit(rho, (energy - chance) / (1 - chance))
