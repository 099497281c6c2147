"""Exact scores of frozen models: hidden states from vLLM, from which logits are rebuilt where they are needed."""
