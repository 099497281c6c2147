"""The main job under `ray job submit`: the same as `raycomplete train`.

raycomplete submit jobs/organism.yaml train.steps=60 output.root=/shared/runs
ray job submit --working-dir . -- python jobs/train.py jobs/organism.yaml train.steps=60 output.root=/shared/runs

The job stands in a copy of the working folder, so results belong on storage that every node sees. It ends with
raycomplete's exit code (0 done, 1 failed at work, 2 refused). `ray job stop` has it write a checkpoint first, and
RAY_JOB_STOP_WAIT_TIME_S leaves it time for that: `submit` sets it, as do cluster.yaml and jobs/deploy/kuberay.
"""

import sys

from raycomplete.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", sys.argv[1:]))
