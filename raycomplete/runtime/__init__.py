"""Errors, files, logs, the console, signals and calls to Ray: what every other room stands on."""
