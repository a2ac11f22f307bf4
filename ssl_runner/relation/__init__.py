"""The relation G over the rows of Z: operators (`operators`, `derived`) and their builders (`builders`)."""

from ssl_runner.relation.derived import DegreeNormalized, ViewExpanded, WithSupportSet, rewire
from ssl_runner.relation.operators import Edges, KNearest, Labels, Relation, Views
from ssl_runner.relation.shared_labels import SharedLabels

__all__ = [
    "DegreeNormalized",
    "Edges",
    "KNearest",
    "Labels",
    "Relation",
    "SharedLabels",
    "ViewExpanded",
    "Views",
    "WithSupportSet",
    "rewire",
]
