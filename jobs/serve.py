"""Evaluation as a service under `ray job submit`: the same as `raycomplete serve`.

ray job submit --working-dir . -- python jobs/serve.py jobs/organism.yaml serve.port=8000
"""

import sys

from raycomplete.cli import run_job
from raycomplete.pipeline.serve import serve

if __name__ == "__main__":
    sys.exit(run_job(serve, sys.argv[1:]))
