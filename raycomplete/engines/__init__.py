"""vLLM engines: how they start, the scorers of the frozen models, rollouts, and weight updates."""
