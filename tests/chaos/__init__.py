"""Failure and endurance tests: many minutes on real clusters, so they run by hand and not with the suite.

python -m tests.chaos.kills --out FOLDER      kills every kind of process of a run, and its node
python -m tests.chaos.soak --minutes 30       watches memory, processes and files of a long on-policy run
"""
