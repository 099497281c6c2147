"""Kills an evaluation of the organism at random moments, and compares what comes of it with an undisturbed one.

    python -m tests.chaos.evaluation --out FOLDER [--kills 5] [--seed 0]

The driver is killed (SIGKILL) and started again by the same command. Nothing that was finished may be lost, changed or
generated twice: every response is noted when it comes. Models of transformers answer in the very process, no Ray;
`python -m tests.chaos.stops evaluate --kill` does it with engines.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.white_box import TorchModel
from raycomplete.config import load_run_file
from raycomplete.data.checkpoints import load_model
from raycomplete.data.inputs import KINDS, prepare_models, prepare_prompts
from raycomplete.evaluation import runner
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.files import RowStore
from raycomplete.runtime.types import Codec
from tests.chaos import driver
from tests.conftest import ROOT

ROLES = ("base", "aligned")
NOTED = "responses.txt"  # a line for each response that was got: the key of its trial
_SETTINGS = (
    "evaluation.num_prompts=5",
    "evaluation.depths=[0,4]",
    "evaluation.max_tokens=24",
    "evaluation.max_utility_tokens=24",
    "evaluation.attacks=[{name: prefill_mid_answer, starts: [16], windows: [8]}, {name: adaptive, cuts: [3]},"
    " templates, {name: rank_assisted_prefill, steps: 12, tops: [5, 20]}, {name: soft_prompt, steps: 4},"
    " {name: decoding, temperatures: [0.7, 1.0], top_ps: [0.9], top_ks: [5]}, {name: best_of_n, samples: 6},"
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
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        found = []
        for place, sequence in enumerate(sequences):
            torch.manual_seed((seed or 0) + place)
            ids = torch.tensor([list(sequence)])
            options = {"attention_mask": torch.ones_like(ids), "eos_token_id": sorted(self._eos_ids), "pad_token_id": 0}
            new = self._model.generate(ids, max_new_tokens=max_tokens, **options, **sampling)[0, ids.shape[1] :]
            found.append([token for token in new.tolist() if token not in self._eos_ids])
        return found


def evaluate_in_this_process() -> None:
    """Evaluates both models by transformers, without Ray and engines."""
    os.environ.pop("RAY_ADDRESS", None)
    runner.RowStore = CountedStore  # type: ignore[misc]
    config = load_run_file(str(ROOT / "jobs" / "organism.yaml"), list(_SETTINGS))
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


Rows = dict[str, dict[str, Any]]


class CountedRun:
    """An evaluation that is started again and again in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._evaluation = folder / "runs" / "organism" / "evaluation"

    def start(self) -> subprocess.Popen[bytes]:
        return driver.start(["-m", "tests.chaos.evaluation", "--work"], self._folder)

    def finish(self) -> None:
        driver.finish(self.start(), self._folder)

    def kill_at(self, stored: int, delay_s: float) -> None:
        """Runs it until so many responses are stored and a little longer, and kills it."""
        process = self.start()
        try:
            driver.wait_while_it_works(process, self._folder, lambda: self.num_stored() >= stored)
            time.sleep(delay_s)
        finally:
            driver.kill_driver(process)

    def rows(self, kind: str) -> Rows:
        """Rows of all stores of a kind by key, without their times."""
        found: Rows = {}
        for path in sorted((self._evaluation / kind).glob("*.jsonl")):
            for row in driver.rows_of(path):
                key = f"{path.stem} {row['key']}"
                assert key not in found, "stored twice"
                found[key] = driver.timeless(row)
        return found

    def num_stored(self) -> int:
        return driver.num_lines(self._evaluation, "trials/*.jsonl")

    def noted(self) -> list[str]:
        """Keys of the responses that were got so far, by all processes."""
        path = self._folder / NOTED
        return path.read_text().split() if path.exists() else []

    def results(self) -> dict[str, Any]:
        """Rates and counts of every model, without times."""
        found = {role: json.loads((self._evaluation / f"{role}.json").read_text()) for role in ROLES}
        return {role: driver.timeless(result) for role, result in found.items()}


def check_killed_evaluation(folder: Path, *, kills: int, seed: int) -> str:
    """Compares an undisturbed evaluation with one that is killed at random moments; says in a line what was done."""
    calm, killed, rng = CountedRun(folder / "calm"), CountedRun(folder / "killed"), random.Random(seed)
    calm.finish()
    total = calm.num_stored()
    assert len(calm.noted()) == len(set(calm.noted())) == total

    moments = sorted(rng.sample(range(1, int(0.95 * total)), kills))
    before, seen = killed.rows("trials"), 0
    for moment in [*moments, None]:
        if moment is None:
            killed.finish()
        else:
            killed.kill_at(moment, 0.2 * rng.random())  # anywhere within a batch
        got, now = killed.noted()[seen:], killed.rows("trials")
        finished = {key.split()[1] for key in before}
        assert not finished & set(got), "generated again"
        assert len(got) == len(set(got)), "generated twice"
        assert {key: now.get(key) for key in before} == before, "lost or changed"
        before, seen = now, seen + len(got)
    for kind in ("trials", "judgements"):
        driver.check_equal(killed.rows(kind), calm.rows(kind), kind)
    driver.check_equal(killed.results(), calm.results(), "results")
    lost = seen - total
    return f"{total} responses, killed after {', '.join(map(str, moments))}; {lost} were under way and made again"


if __name__ == "__main__":
    parser = driver.options("evaluation", kills=5, seed=0)
    parser.add_argument("--work", action="store_true", help="the evaluation itself")
    given = parser.parse_args()
    if given.work:
        evaluate_in_this_process()
    else:
        print(check_killed_evaluation(given.out, kills=given.kills, seed=given.seed))
