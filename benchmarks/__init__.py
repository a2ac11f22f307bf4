"""Benchmarks of ssl_runner against peer libraries, run by `scripts/bench`; results: docs/performance.md."""
