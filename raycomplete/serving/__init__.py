"""Evaluations over HTTP, on Ray Serve: a queue that survives restarts, its runners, and a web page."""
