"""Evaluation under `ray job submit`: the same as `raycomplete evaluate`.

ray job submit --working-dir . -- python jobs/evaluate.py jobs/organism.yaml
"""

import sys

from raycomplete.cli import run_job
from raycomplete.pipeline.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(run_job(evaluate, sys.argv[1:]))
