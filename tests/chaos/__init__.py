"""Failure and endurance tests: many minutes on real clusters, so they run by hand and not with the suite.

    python -m tests.chaos.kills       kills every kind of process of a run, and its node
    python -m tests.chaos.stops       stops a command by SIGTERM
    python -m tests.chaos.evaluation  kills an evaluation
    python -m tests.chaos.study       kills or stops a study
    python -m tests.chaos.requests    asks the service with a thousand clients
    python -m tests.chaos.soak        watches memory, processes and files of a long on-policy run

Each takes `--out FOLDER` and fails where something was lost, done twice or differs from an undisturbed run.
"""
