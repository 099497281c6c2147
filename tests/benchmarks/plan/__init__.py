"""The formulas of `raycomplete plan` beside measured runs."""
