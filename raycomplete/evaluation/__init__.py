"""Evaluation: how well attacks work, what a model is still good for, and what it refuses without need."""
