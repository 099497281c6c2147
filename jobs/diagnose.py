"""Diagnosis under `ray job submit`: the same as `raycomplete diagnose`.

ray job submit --working-dir . -- python jobs/diagnose.py jobs/organism.yaml
"""

import sys

from raycomplete.cli import run_job
from raycomplete.pipeline.diagnose import diagnose

if __name__ == "__main__":
    sys.exit(run_job(diagnose, sys.argv[1:]))
