"""The main job under `ray job submit`: the same as `raycomplete train`.

ray job submit --working-dir . -- python jobs/train.py jobs/organism.yaml train.steps=60
"""

import sys

from raycomplete.cli import run_job
from raycomplete.pipeline.train import train

if __name__ == "__main__":
    sys.exit(run_job(train, sys.argv[1:]))
