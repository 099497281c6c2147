"""One step of GCG beside a plain one that works as raycomplete did before: the same candidates, losses and choice."""
