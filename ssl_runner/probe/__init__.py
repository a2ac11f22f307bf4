"""Probes: classifiers of frozen features, and the baselines that they are compared with."""

from ssl_runner.probe.baselines import linear_discriminants, principal_components
from ssl_runner.probe.during_training import BestEpoch, ProbeEvaluator
from ssl_runner.probe.knn import KnnProbe
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.protocol import Classifier, Probe, evaluate, extract
from ssl_runner.probe.ridge import RidgeProbe

__all__ = [
    "BestEpoch",
    "Classifier",
    "KnnProbe",
    "LinearProbe",
    "Probe",
    "ProbeEvaluator",
    "RidgeProbe",
    "evaluate",
    "extract",
    "linear_discriminants",
    "principal_components",
]
