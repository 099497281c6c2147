"""How well attacks work, what a model is still good for, and what it refuses without need.

`evaluate_model` measures one model into its run folder, `summarize` compares models, `closing_table` prints them.
"""

from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.trial import EvaluationCancelled, Progress
from raycomplete.evaluation.comparison import paired_bootstrap
from raycomplete.evaluation.correction import corrected_asr, rogan_gladen
from raycomplete.evaluation.judge import RefusalJudge
from raycomplete.evaluation.runner import evaluate_model
from raycomplete.evaluation.sets import EvaluationSets
from raycomplete.evaluation.statistics import mean_over_depths, mean_over_trials, wilson, worst_of_trials
from raycomplete.evaluation.summary import summarize
from raycomplete.evaluation.table import closing_table, rate_text

__all__ = [
    "AttackTools",
    "Attacker",
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
