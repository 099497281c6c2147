"""Prompts, chat templates, checkpoints and the model organism."""
