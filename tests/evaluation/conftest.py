"""Fixtures of attacks and evaluation: a scripted model, its codec, prompts and tools."""

from tests.attacks.fixtures import codec, model, sets, target, tools

__all__ = ["codec", "model", "sets", "target", "tools"]
