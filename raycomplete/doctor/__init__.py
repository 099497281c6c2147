"""`raycomplete doctor`: what is there, what a run needs, and what to do where the two differ.

Each family of checks is one file; each check is a function from a `Context` to a `Finding`. Whatever imports torch, ray
or vllm happens in a child process (`child.py`), so that a broken installation is a finding and not the doctor's end.
"""
