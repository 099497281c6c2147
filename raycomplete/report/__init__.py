"""One page and a folder of figures from a run folder."""
