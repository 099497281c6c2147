"""Evaluation as a service under `ray job submit`: the same as `raycomplete serve`.

raycomplete submit jobs/organism.yaml serve.state=/var/lib/raycomplete --job serve
ray job submit --working-dir . -- python jobs/serve.py jobs/organism.yaml serve.state=/var/lib/raycomplete

The service runs for as long as the job; `ray job stop` puts evaluations at work back. jobs/serve.yaml is the same for
`serve deploy`, where Ray Serve keeps it alive.
"""

import sys

from raycomplete.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("serve", sys.argv[1:]))
