"""Checkpoint integrity, and a mirror of the run folder on S3, GCS, a mount or any file system that fsspec knows."""
