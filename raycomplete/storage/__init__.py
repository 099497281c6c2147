"""Checkpoints and results beyond the run folder: integrity, retention, and a mirror on any file system.

integrity  sizes and sha256 of a checkpoint's files; which checkpoint is whole, which may go
remote     one file system (S3, GCS, a mount, ...) behind five calls
pieces     what of a run folder is mirrored, and the manifests without which nothing counts
mirror     the thread that keeps the storage up to date while a run works
restore    from the storage into a run folder that is empty or behind
session    all of this around one command
"""
