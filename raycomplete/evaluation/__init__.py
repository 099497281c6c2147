"""Evaluation: how well attacks work, what a model is still good for, and what it refuses without need.

`evaluate_model` measures one model into its run folder, `summarize` compares models, `closing_table` prints them.
"""

from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.trial import EvaluationCancelled, Progress
from raycomplete.evaluation.calibration import corrected_asr, rogan_gladen
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import Callbacks, EvaluationSets, evaluate_model
from raycomplete.evaluation.statistics import (
    mean_over_depths,
    mean_over_trials,
    paired_bootstrap,
    wilson,
    worst_of_trials,
)
from raycomplete.evaluation.summary import closing_table, rate_text, summarize

__all__ = [
    "AttackTools",
    "Attacker",
    "Callbacks",
    "EvaluationCancelled",
    "EvaluationSets",
    "Progress",
    "RefusalJudge",
    "Target",
    "closing_table",
    "corrected_asr",
    "evaluate_model",
    "mean_over_depths",
    "mean_over_trials",
    "paired_bootstrap",
    "rate_text",
    "rogan_gladen",
    "summarize",
    "wilson",
    "worst_of_trials",
]
