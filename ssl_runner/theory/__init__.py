"""The spectral theory of the losses: optima over free embeddings and linear models, and what they imply for a trained model."""

from ssl_runner.theory.optima import EXACT, LOWER, UPPER, Optimum, optimum

__all__ = ["EXACT", "LOWER", "UPPER", "Optimum", "optimum"]
