"""Probes: classifiers of frozen features, and the baselines that they are compared with."""

from ssl_runner.probe.cache import BaselineCache
from ssl_runner.probe.during_training import BestEpoch, ProbeEvaluator
from ssl_runner.probe.finetune import FineTuning, finetune
from ssl_runner.probe.knn import KnnProbe
from ssl_runner.probe.linear import LinearProbe
from ssl_runner.probe.networks import (
    LayerFeatures,
    affordable,
    check_layer,
    evaluate_seeded,
    feature_networks,
    layer_names,
)
from ssl_runner.probe.protocol import Classifier, Probe, evaluate, extract
from ssl_runner.probe.ridge import RidgeProbe
from ssl_runner.probe.shares import LabelDraw, label_draws

__all__ = [
    "BaselineCache",
    "BestEpoch",
    "Classifier",
    "FineTuning",
    "KnnProbe",
    "LabelDraw",
    "LayerFeatures",
    "LinearProbe",
    "Probe",
    "ProbeEvaluator",
    "RidgeProbe",
    "affordable",
    "check_layer",
    "evaluate",
    "evaluate_seeded",
    "extract",
    "feature_networks",
    "finetune",
    "label_draws",
    "layer_names",
]
