"""Benchmarks against other libraries; `make bench` runs them, `make test` does not. Results are in docs/speed.md."""
