"""Tokens a second of a whole training step against TRL's distillation trainers, on the same models and sequences."""
