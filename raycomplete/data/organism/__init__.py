"""The model organism: a tiny fictional base and aligned model pair, small enough to train and attack on a laptop.

It behaves as large aligned models do: the base complies with everything, the aligned model refuses restricted items at
depth 0, and complies again once a few tokens of the answer are prefilled. Importing this package loads no torch.
"""

from raycomplete.data.organism.judge import REFUSAL_STARTS, OrganismJudge
from raycomplete.data.organism.locate import checkpoint_path
from raycomplete.data.organism.prompts import prompts

__all__ = ["REFUSAL_STARTS", "OrganismJudge", "checkpoint_path", "prompts"]
