"""ssl_runner: self-supervised learning as a function of embeddings Z and a relation G."""

__version__ = "0.1.0"
