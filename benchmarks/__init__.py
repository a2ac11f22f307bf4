"""Benchmarks beside the tools that users would else take: `scripts/bench`. Figures are for docs/performance.md; no test times anything."""
