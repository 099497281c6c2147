"""Real clients of OpenAI's interface against a running service; `make interop` runs them. No test collects this."""
