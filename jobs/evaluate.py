"""Evaluation under `ray job submit`: the same as `raycomplete evaluate`.

raycomplete submit jobs/organism.yaml output.root=/shared/runs --job evaluate
ray job submit --working-dir . -- python jobs/evaluate.py jobs/organism.yaml output.root=/shared/runs

See jobs/train.py for folders, exit codes and stops.
"""

import sys

from raycomplete.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", sys.argv[1:]))
