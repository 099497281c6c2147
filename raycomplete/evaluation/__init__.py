"""How well an attack works, what a model is still good for, and what it refuses without need.

`evaluate_model` measures one model into its run folder, `summarize` compares models, `closing_table` prints them.
"""

from raycomplete.evaluation.judge import RefusalJudge
from raycomplete.evaluation.prefill import EvaluationSets
from raycomplete.evaluation.runner import evaluate_model
from raycomplete.evaluation.statistics import mean_over_depths, wilson
from raycomplete.evaluation.summary import summarize
from raycomplete.evaluation.table import closing_table, rate_text

__all__ = [
    "EvaluationSets",
    "RefusalJudge",
    "closing_table",
    "evaluate_model",
    "mean_over_depths",
    "rate_text",
    "summarize",
    "wilson",
]
