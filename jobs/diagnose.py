"""Diagnosis under `ray job submit`: the same as `raycomplete diagnose`.

raycomplete submit jobs/organism.yaml output.root=/shared/runs --job diagnose
ray job submit --working-dir . -- python jobs/diagnose.py jobs/organism.yaml output.root=/shared/runs

See jobs/train.py for folders, exit codes and stops.
"""

import sys

from raycomplete.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("diagnose", sys.argv[1:]))
