"""Attacks, one file each: settings and code side by side, registered by name."""
