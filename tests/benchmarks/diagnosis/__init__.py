"""Diagnosis against the scoring engines' own rate, with the driver's memory watched."""
