"""Measurements of where alignment stopped, by position in the response."""
