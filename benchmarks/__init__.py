"""Benchmarks beside the tools that users would else take: `scripts/bench`, whose figures are in docs/performance.md."""
