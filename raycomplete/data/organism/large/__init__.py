"""The large model organism, between the toy and real models: depth beyond 64, sampling and ranks of tokens count."""
