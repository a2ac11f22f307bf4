"""ssl_runner: self-supervised learning as a function of embeddings Z and a graph G of positive pairs."""

__version__ = "0.1.0"
