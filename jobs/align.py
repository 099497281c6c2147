"""Safety SFT under `ray job submit`: the same as `raycomplete align`.

ray job submit --working-dir . -- python jobs/align.py jobs/smollm2.yaml
"""

import sys

from raycomplete.cli import run_job
from raycomplete.pipeline.align import align

if __name__ == "__main__":
    sys.exit(run_job(align, sys.argv[1:]))
