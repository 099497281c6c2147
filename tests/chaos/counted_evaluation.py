"""An evaluation of the organism that notes every response it gets.

python -m tests.chaos.counted_evaluation process   models of transformers in this very process, no Ray
python -m tests.chaos.counted_evaluation engines   as `raycomplete evaluate` does it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import raycomplete as rc
from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.checkpoints import load_model
from raycomplete.data.inputs import KINDS, prepare_models, prepare_prompts
from raycomplete.evaluation import runner
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.files import RowStore
from raycomplete.runtime.types import Codec
from tests.conftest import ROOT

ROLES = ("base", "aligned")
NOTED = "responses.txt"  # a line for each response that was got: the key of its trial
_SETTINGS = (
    "evaluation.num_prompts=5",
    "evaluation.depths=[0,4]",
    "evaluation.max_tokens=24",
    "evaluation.max_utility_tokens=24",
    "evaluation.nll_prompts=0",
    "evaluation.attacks=[{name: prefill_mid_answer, starts: [16], windows: [8]}, {name: adaptive, cuts: [3]},"
    " templates, {name: rank_assisted_prefill, steps: 12, tops: [5, 20]}, {name: soft_prompt, steps: 4, ask_every: 2},"
    " {name: decoding, temperatures: [0.7, 1.0], top_ps: [0.9], top_ks: [5]}, {name: best_of_n, samples: 6, batch: 3},"
    " {name: gcg, steps: 2, search_width: 16, suffix_tokens: 4}, {name: pair, streams: 2, rounds: 2, max_tokens: 8}]",
    "output.root=runs",
    "output.name=organism",
)


class CountedStore(RowStore):
    """Notes the key of each response before it is stored."""

    def __init__(self, path: Path, *, mode: int = 0o644) -> None:
        super().__init__(path, mode=mode)
        self._noted = path.parent.name == "trials"

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        if self._noted:
            with open(NOTED, "a") as stream:
                stream.writelines(f"{row['key']}\n" for row in rows)
        super().add(rows)


class LocalGenerator:
    """A model that continues sequences one by one, each drawn under a seed of its own."""

    def __init__(self, model: Any, codec: Codec) -> None:
        self._model, self._eos_ids = model, codec.eos_ids

    @torch.no_grad()
    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[list[int]]:
        found = []
        for place, sequence in enumerate(sequences):
            draws = torch.Generator().manual_seed((seed or 0) + place)
            new: list[int] = []
            ids, cache = torch.tensor([list(sequence)]), None
            while len(new) < max_tokens:
                output = self._model(ids, past_key_values=cache, use_cache=True)
                cache, values_V = output.past_key_values, output.logits[0, -1]
                if temperature > 0:
                    sorted_V, order_V = (values_V / temperature).softmax(-1).sort(descending=True, stable=True)
                    kept_V = sorted_V.cumsum(-1) - sorted_V < top_p
                    kept_V[top_k or len(kept_V) :] = False
                    token = int(order_V[torch.multinomial(sorted_V * kept_V, 1, generator=draws)])
                else:
                    token = int(values_V.argmax())
                if token in self._eos_ids:
                    break
                new.append(token)
                ids = torch.tensor([[token]])
            found.append(new)
        return found


def in_this_process(config: rc.RunConfig) -> None:
    """The evaluation of both models, without engines."""
    torch.set_num_threads(1)
    models = prepare_models(config, roles=ROLES)
    prompts = prepare_prompts(config, models.codec, training=False).evaluation
    sets = runner.EvaluationSets(*(prompts[kind] for kind in KINDS))
    loaded = {role: load_model(models.paths[role], "float32").eval() for role in ROLES}
    base = LocalGenerator(loaded["base"], models.codec)
    for role in ROLES:
        box, guide = TorchModel(loaded[role]), TorchModel(loaded["base"])
        tools = AttackTools(
            white_boxes=lambda box=box: [box],
            guide=lambda guide=guide: guide,
            guide_id=models.fingerprint("base"),
            attacker=lambda _: Attacker("base", base, models.codec, config.models.max_length),
        )
        generator, evaluation = LocalGenerator(loaded[role], models.codec), config.evaluation
        judge, length = default_judge("organism"), config.models.max_length
        codec, weights = models.codec, models.fingerprint(role)
        target = Target(role, weights, generator, codec, judge, length, evaluation.max_tokens, tools)
        runner.evaluate_model(target, sets, evaluation, config.output.folder)


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    runner.RowStore = CountedStore  # type: ignore[misc]
    run_file = rc.load_run_file(str(ROOT / "jobs" / "organism.yaml"), list(_SETTINGS))
    if sys.argv[1] == "engines":
        rc.evaluate(run_file)
    else:
        in_this_process(run_file)
