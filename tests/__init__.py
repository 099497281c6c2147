"""Tests and benchmarks, room by room as in the package."""

import raycomplete  # noqa: F401  first, since it says how OpenMP waits, which torch reads when it is loaded
