"""A run on paper: memory, speed, payload, cost and bottleneck from model shapes and hardware, before anything runs.

Plain formulas; neither torch nor ray is imported. Sizes are in bytes, times in seconds, rates per second. What the
formulas assume stands in `estimate.assumptions`, and `tests/benchmarks/plan` compares them with measured runs.
"""
