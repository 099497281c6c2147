"""Evaluation of the models of a run, one after another, on held-out prompts that are completed first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Progress, TrialCost
from raycomplete.config import EvaluationConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import KINDS, Prompts
from raycomplete.data.organisms import ORGANISMS
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.data.thinking import thinking
from raycomplete.engines.run import Run
from raycomplete.evaluation.attack_resources import AttackResources
from raycomplete.evaluation.defences.start import start_defence
from raycomplete.evaluation.model_judges import start_judge, start_model
from raycomplete.evaluation.results import answers_id
from raycomplete.evaluation.runner import Callbacks, EvaluationSets, evaluate_model
from raycomplete.runtime.console import Advance
from raycomplete.runtime.files import PRIVATE, content_hash, read_json, write_json
from raycomplete.runtime.types import Codec, Generator, ModelRole, Prompt

PREFILL_OPENING = "Of course. To begin with,"  # none of rollout.affirmative_prefixes, which training recovers from
_ROLE = "prefill_from"


def held_out_sets(run: Run) -> Prompts:
    """Completes the harmful answers that prefills are cut from, and judges them.

    They are kept in the run folder, readable by its owner only, so that a resumed evaluation cuts the same prefills.
    """
    config, models, prompts = run.config, run.models, run.prompts
    if config.data.source in ORGANISMS:
        return prompts
    source, file = config.evaluation.prefill_from, run.folder / "evaluation" / "prefills.json"
    harmful, codec = prompts.evaluation["harmful"], models.codec.with_thinking(False)
    made_from = {
        "source": answers_id(models.fingerprint("base"), codec)
        if source == "base"
        else fingerprint(resolve_checkpoint(source, role=_ROLE)),
        "depth": config.evaluation.deepest_prefill,
        "opening": PREFILL_OPENING,
        "prompts": [
            [prompt.prompt_id, content_hash([prompt.text, prompt.answer, *prompt.context, prompt.encoded(codec)])]
            for prompt in harmful
        ],
    }
    known = read_json(file)
    if known is None or known["made_from"] != made_from or "go_on" not in known:
        with ExitStack() as ended:
            if source == "base":
                generator, codec = run.generator("base"), models.codec
            else:
                started = start_model(config, source, _ROLE, "model that writes prefills", run.console)
                _, generator, codec = ended.enter_context(started)
            with run.console.stage(f"Prefills for {len(harmful)} held-out harmful prompts, from {source}"):
                completed = complete_answers(config.evaluation, codec, generator, harmful)
        # A prefill that refuses by itself is no attack. It stays in the denominator, and the count is published.
        outcomes = Counter(str(run.judge.outcome(prompt, "", prompt.answer or "")) for prompt in completed)
        answers = {prompt.prompt_id: prompt.answer for prompt in completed}
        go_on = [prompt.prompt_id for prompt in completed if prompt.answer_goes_on]
        known = {"made_from": made_from, "outcomes": dict(outcomes), "answers": answers, "go_on": go_on}
        write_json(file, known, mode=PRIVATE)
    run.console.note(f"Outcomes of the prefills without a model's answer: {known['outcomes']}")
    answers, go_on = known["answers"], known["go_on"]
    answered = tuple(
        replace(prompt, answer=answers[prompt.prompt_id], answer_goes_on=prompt.prompt_id in go_on)
        for prompt in harmful
    )
    return replace(prompts, evaluation=prompts.evaluation | {"harmful": answered})


def complete_answers(
    config: EvaluationConfig, codec: Codec, generator: Generator, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Completes the compliant answers of held-out harmful prompts, to the deepest cut or as far as the model goes.

    Public sets give the first sentence of a harmful answer only. A model continues it greedily, or `PREFILL_OPENING`
    where there is none: other words, drawn in another way than the continuations that training recovers from.
    """
    needed = config.deepest_prefill
    codec = codec.with_thinking(False)
    starts = [codec.encode_answer(prompt.answer or PREFILL_OPENING) for prompt in prompts]
    short = [index for index, start in enumerate(starts) if len(start) < needed]
    sequences = [[*prompts[index].encoded(codec), *starts[index]] for index in short]
    added = generator.generate(sequences, max_tokens=needed) if short else []
    completed = list(prompts)
    for index, tokens in zip(short, added, strict=True):
        answer, goes_on = codec.decode([*starts[index], *tokens]), len(tokens) == needed
        completed[index] = replace(prompts[index], answer=answer, answer_goes_on=goes_on)
    return completed


def evaluate_roles(run: Run, roles: Sequence[ModelRole]) -> dict[str, dict[str, Any]]:
    """Evaluates models by one generator that takes the weights of each in turn; returns the result of each role."""
    codec, max_length, max_tokens = run.models.codec, run.config.models.max_length, run.config.evaluation.max_tokens
    thought = run.config.evaluation.max_thinking_tokens
    results = {}
    with ExitStack() as ended, start_judge(run.config, run.judge, run.console) as judge:
        resources, defence = AttackResources(run, ended), start_defence(run, ended)
        for role in roles:
            path = run.models.paths.get(role)
            tools, is_defended = resources.tools(path), defence is not None and role == "student"
            generator: Generator
            if path is None:  # it thinks as its server says
                asked = f"prefill {run.config.evaluation.remote.prefill}"  # answers depend on how one is begun
                generator, model_id = run.generator(role), f"{run.models.fingerprint(role)} {asked}"
            else:
                pool, model_id = run.engines.generator.with_weights(str(path)), answers_id(fingerprint(path), codec)
                generator = thinking(pool, codec, thought)
                if defence is not None and is_defended:
                    generator, tools = defence.around(pool), defence.tools(tools)
                    model_id += f" behind {defence.key}"
            if codec.frame is not None and codec.frame.thinks:  # how long it may think decides what it answers
                model_id += f" thinks {thought}"
            target = Target(
                role, model_id, generator, codec, judge, max_length, max_tokens, tools, run.is_stopping, thought
            )
            results[str(role)] = evaluate_target(run, target)
            if defence is not None and is_defended:
                results[str(role)]["defence"] = defence.result()
                write_json(run.folder / "evaluation" / f"{role}.json", results[str(role)])
    return results


def evaluate_target(run: Run, target: Target) -> dict[str, Any]:
    """Evaluates one model on the held-out prompts of the run: first its cost, then a progress bar."""
    title = f"Evaluation of {target.role}"
    advance: Advance | None = None
    with ExitStack() as shown:

        def plan(costs: Mapping[str, TrialCost], stored: Mapping[str, int]) -> None:
            nonlocal advance
            run.console.table(f"{title}: cost at most", cost_table(costs))
            total = sum(stored.values()) + sum(cost.trials for cost in costs.values())
            advance = shown.enter_context(run.console.progress(title, total))

        def follow(progress: Progress) -> None:
            if advance is not None:
                advance(progress.done, progress.attack)
            if run.on_progress is not None:
                run.on_progress(progress)

        sets = EvaluationSets(*(run.prompts.evaluation[kind] for kind in KINDS))
        callbacks = Callbacks(on_plan=plan, on_trials=follow)
        return evaluate_model(target, sets, run.config.evaluation, run.folder, callbacks)


def cost_table(costs: Mapping[str, TrialCost]) -> list[list[str]]:
    """Makes the rows of a table of the cost of each attack, the header first."""
    rows = [["", "trials", "tokens", "passes", "gradients"]]
    for name, cost in costs.items():
        rows.append([name, *map(_short, (cost.trials, cost.tokens, cost.passes, cost.gradients))])
    return rows


def _short(number: int) -> str:
    """Formats a count in at most five characters."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(number or "-")
