"""Safety SFT under `ray job submit`: the same as `raycomplete align`.

raycomplete submit jobs/mine.yaml models.aligned=/shared/mine-aligned output.root=/shared/runs --job align
ray job submit --working-dir . -- python jobs/align.py jobs/mine.yaml models.aligned=/shared/mine-aligned

See jobs/train.py for folders, exit codes and stops.
"""

import sys

from raycomplete.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("align", sys.argv[1:]))
