"""Closed-form optima of the losses for free embeddings and linear models, and distances to them."""

from ssl_runner.theory import whitening  # noqa: F401  registers closed forms
from ssl_runner.theory.linear import LinearOptimum, linear_optimum, value_of
from ssl_runner.theory.optima import EXACT, LOWER, UPPER, Optimum, optimum

__all__ = ["EXACT", "LOWER", "UPPER", "LinearOptimum", "Optimum", "linear_optimum", "optimum", "value_of"]
