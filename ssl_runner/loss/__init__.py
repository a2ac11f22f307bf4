"""The losses, each a function of the embeddings Z (N, K) and a relation G over their rows."""

from ssl_runner.loss.barlow import BarlowTwins
from ssl_runner.loss.base import Loss
from ssl_runner.loss.frossl import FroSSL
from ssl_runner.loss.mmcr import MMCR
from ssl_runner.loss.sigreg import SIGReg
from ssl_runner.loss.simclr import SimCLR
from ssl_runner.loss.spectral import SpectralContrastive
from ssl_runner.loss.vicreg import VICReg
from ssl_runner.loss.wmse import WMSE

__all__ = [
    "MMCR",
    "WMSE",
    "BarlowTwins",
    "FroSSL",
    "Loss",
    "SIGReg",
    "SimCLR",
    "SpectralContrastive",
    "VICReg",
]
