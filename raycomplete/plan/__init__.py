"""A run on paper: memory, speed, payload, cost and bottleneck from model shapes and hardware, before anything runs.

Plain formulas that import neither torch nor ray. Sizes are in bytes, times in seconds, rates per second. A plan lists
what its formulas assume, and docs/notes/speed.md compares them with measured runs.
"""
