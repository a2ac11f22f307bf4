"""The relation G between the rows of Z: operators (`operators`) and how a batch gets one (`builders`)."""

from ssl_runner.relation.operators import (
    DegreeNormalized,
    Edges,
    KNearest,
    Labels,
    Relation,
    ViewExpanded,
    Views,
    WithSupportSet,
    rewire,
    to_float64,
)

__all__ = [
    "DegreeNormalized",
    "Edges",
    "KNearest",
    "Labels",
    "Relation",
    "ViewExpanded",
    "Views",
    "WithSupportSet",
    "rewire",
    "to_float64",
]
