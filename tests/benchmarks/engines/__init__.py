"""vLLM against transformers on the CPU: sampling and scoring in one process."""
