"""Number and size of the views of each policy. Imports neither Hydra nor torch."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ssl_runner.rule import Rule

RULES = {"size": Rule(int, low=4, optional=True), "count": Rule(int, low=1, optional=True)}


def layout(policies: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the size and the count of each policy by its name, None where there is none.

    Raises ValueError for an invalid value, or if only some of the policies have a count.
    """
    sizes, counts = (
        {name: policy.get(key) if isinstance(policy, Mapping) else None for name, policy in policies.items()}
        for key in RULES
    )
    for (key, rule), values in zip(RULES.items(), (sizes, counts), strict=True):
        for name, value in values.items():
            if not rule.accepts(value):
                raise ValueError(f"views.policies.{name}.{key}={value}: expected {rule}")
    uncounted = [name for name, count in counts.items() if count is None]
    if 0 < len(uncounted) < len(counts):
        raise ValueError(
            f"views.policies.{uncounted[0]}.count=null: expected an integer >= 1, since another policy has a"
            " count; set it"
        )
    return sizes, counts


def view_count(policies: Mapping[str, Any]) -> int:
    """Return the sum of the counts, 0 for policies without counts. Raises nothing for invalid policies."""
    counts = [policy.get("count") for policy in policies.values() if isinstance(policy, Mapping)]
    return sum(count for count in counts if type(count) is int)


def check_views(views: Mapping[str, Any], V: int, linear_backbone: bool) -> None:
    """Raise ValueError if the views of `ssl_runner.views.Augment` contradict other options of a run."""
    policies = views["policies"]
    if not isinstance(policies, Mapping):
        given = "null" if policies is None else policies
        raise ValueError(f"views.policies={given}: expected <name>: <options of the policy>, once or more")
    sizes, _ = layout(policies)
    total = view_count(policies)
    if total not in (0, V):
        raise ValueError(f"V={V}: expected {total}, the sum of count over views.policies; set V={total}")
    name, size = next(((name, size) for name, size in sizes.items() if size is not None), ("", None))
    if size is None:
        return
    given = f"views.policies.{name}.size={size}"
    if views["resolutions"] is not None:
        raise ValueError(f"{given}: expected null with views.resolutions; leave one of the two out")
    if linear_backbone:
        raise ValueError(f"{given}: expected null with backbone=linear, which accepts one size; leave it out")


def by_side(
    sizes: Sequence[int | None], counts: Sequence[int | None], V: int, default: int | None
) -> dict[int | None, dict[int, list[int]]]:
    """Return, for each side of the views in pixels, the policies by number and the views of each.

    The V views are those of the first policy, of the second, ..., or without counts those of policy v mod P.
    Those of one side keep this order, and are numbered from 0. `default` is the side of policies without one.
    """
    P, numbers = len(sizes), iter(range(V))
    views = [range(p, V, P) if n is None else [*islice(numbers, n)] for p, n in enumerate(counts)]
    sides = [size or default for size in sizes]
    groups = {}
    for side in dict.fromkeys(sides):
        members = [p for p in range(P) if sides[p] == side and len(views[p])]
        position = {v: number for number, v in enumerate(sorted(v for p in members for v in views[p]))}
        if position:
            groups[side] = {p: [position[v] for v in views[p]] for p in members}
    return groups
