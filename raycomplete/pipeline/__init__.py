"""Wires the rooms into the commands: align, train, evaluate."""
