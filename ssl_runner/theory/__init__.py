"""Optima of the losses for free embeddings and linear models, and distances to them."""

from ssl_runner.theory import frames, simclr, whitening  # noqa: F401  they register optima
from ssl_runner.theory.gamma import thresholds
from ssl_runner.theory.linear import LinearOptimum, linear_optimum, value_of
from ssl_runner.theory.optima import EXACT, LOWER, NUMERIC, UPPER, Optimum, optimum

__all__ = [
    "EXACT",
    "LOWER",
    "NUMERIC",
    "UPPER",
    "LinearOptimum",
    "Optimum",
    "linear_optimum",
    "optimum",
    "thresholds",
    "value_of",
]
