"""Text from models: rollouts for training and responses for evaluation, on vLLM."""
