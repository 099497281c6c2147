"""The run file, and the checkpoints and prompts that it names."""

from __future__ import annotations

import json

from raycomplete.doctor.child import Answer, ask
from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.doctor.needs import local_folder

TIMEOUT_S = 240.0


def check_run_file(context: Context) -> Finding:
    """Whether the run file loads."""
    if context.problem is not None:
        return fail(context.problem.problem, context.problem.remedy or "Mend it and ask again.")
    if context.config is None:
        return ok("None given; needs of the demo are assumed.")
    config = context.config
    steps, workers = config.train.steps, config.train.num_workers
    return ok(f"{context.run_file} loads: {steps} steps, {workers} workers, into {config.output.folder}.")


def check_checkpoints(context: Context) -> Finding:
    """Whether the checkpoints are there, safe and of one family."""
    if context.config is None:
        return ok("No run file, no checkpoints.")
    absent = [spec for spec in _specs(context) if local_folder(spec) is None]
    waiting = [spec for spec in absent if spec.partition(":")[0] in ("hub", "package") or spec.endswith(".gguf")]
    if waiting:
        return warn(
            f"Not looked into before a run fetches or converts them: {', '.join(waiting)}.",
            "raycomplete evaluate fetches them; a folder of safetensors is checked here.",
        )
    return _part(context, "checkpoints")


def check_prompts(context: Context) -> Finding:
    """Whether every prompt file is readable and every prompt fits the context."""
    if context.config is None:
        return ok("No run file, no prompts.")
    if any(local_folder(spec) is None for spec in _specs(context)):
        return warn("Not looked into without the tokenizer of the checkpoints.", "See the check of the checkpoints.")
    return _part(context, "prompts")


def _part(context: Context, name: str) -> Finding:
    answer: Answer = context.once("inputs", lambda: _ask(context))
    said = answer.merged.get(name)
    if said is None:
        missing = answer.merged.get("checkpoints", {}).get("problem")
        if missing:  # prompts need a tokenizer
            return warn("Not looked into without usable checkpoints.", "See the check of the checkpoints.")
        return fail(f"They cannot be read ({answer.ending(TIMEOUT_S)}).", "See the check of the imports.")
    if "problem" in said:
        return fail(said["problem"], said["remedy"] or "Mend it and ask again.")
    return ok(said["found"])


def _ask(context: Context) -> Answer:
    assert context.config is not None
    question = json.dumps(context.config.model_dump(mode="json"))
    return ask("probe_inputs", question, timeout_s=TIMEOUT_S, environment={"HF_HUB_OFFLINE": "1"})


def _specs(context: Context) -> list[str]:
    assert context.config is not None
    models = context.config.models
    return list(dict.fromkeys([models.base, models.aligned, models.student or models.aligned]))
