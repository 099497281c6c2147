"""`raycomplete doctor`: what this machine and the cluster have, what a run needs, and a remedy where the two differ.

A check is a function from a `Context` to a `Finding`. Code that imports torch, ray or vllm runs in a child process
(`probes`), so that a broken installation is a finding and does not end the doctor.
"""
