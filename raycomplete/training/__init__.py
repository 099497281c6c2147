"""Updating the student: Ray Train workers around a DeepSpeed engine."""
