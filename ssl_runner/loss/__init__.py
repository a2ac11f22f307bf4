"""Losses. Each is a function of the embeddings Z (N, K) and a relation G over the N rows."""

from ssl_runner.loss.barlow import BarlowTwins
from ssl_runner.loss.base import Loss
from ssl_runner.loss.simclr import SimCLR
from ssl_runner.loss.simclr_squared import SquaredSimCLR
from ssl_runner.loss.vicreg import VICReg

__all__ = ["BarlowTwins", "Loss", "SimCLR", "SquaredSimCLR", "VICReg"]
