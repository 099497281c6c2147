"""Checks of the run file, the checkpoints and prompts that it names, and a real vLLM engine."""

from __future__ import annotations

import json

from raycomplete.doctor.findings import PROBES, ChildReport, Context, Finding, ask, fail, ok, warn
from raycomplete.doctor.machine import local_folder, student_of
from raycomplete.doctor.packages import import_report
from raycomplete.doctor.probes import smoke_spec

TIMEOUT_S = 240.0
ENGINE_TIMEOUT_S = 300.0


def check_run_file(context: Context) -> Finding:
    """Loads the run file."""
    if context.problem is not None:
        return fail(context.problem.problem, context.problem.remedy or "Mend it and ask again.")
    if context.config is None:
        return ok("None given; needs of the demo are assumed.")
    config = context.config
    steps, workers = config.train.steps, config.train.num_workers
    return ok(f"{context.run_file} loads: {steps} steps, {workers} workers, into {config.output.folder}.")


def check_checkpoints(context: Context) -> Finding:
    """Reads the checkpoints, which must be safe and of one family."""
    if context.config is None:
        return ok("No run file, no checkpoints.")
    waiting = [spec for spec in _absent(context) if spec.startswith(("hub:", "package:")) or spec.endswith(".gguf")]
    if waiting:
        return warn(
            f"Not looked into before a run fetches or converts them: {', '.join(waiting)}.",
            "raycomplete evaluate fetches them; a folder of safetensors is checked here.",
        )
    return _part(context, "checkpoints")


def check_prompts(context: Context) -> Finding:
    """Reads every prompt file; each prompt must fit the context."""
    if context.config is None:
        return ok("No run file, no prompts.")
    if _absent(context):
        return warn("Not looked into without the tokenizer of the checkpoints.", "See the check of the checkpoints.")
    return _part(context, "prompts")


def check_engine(context: Context) -> Finding:
    """Starts a pooling engine and a generating one on the organism, and compares the token that each predicts."""
    if context.quick:
        return ok("Left out (--quick).")
    has_gpu = bool(import_report(context).merged.get("torch", {}).get("devices"))
    use_gpu = has_gpu and (context.config is None or context.config.cluster.use_gpu != "never")
    device, environment = "gpu" if use_gpu else "cpu", smoke_spec(use_gpu).environment()
    return engine_finding(ask(PROBES, "engine", device, timeout_s=ENGINE_TIMEOUT_S, environment=environment), device)


def engine_finding(answer: ChildReport, device: str) -> Finding:
    """Turns the messages of the engine probe into a finding."""
    said = answer.merged
    if "error" in said or answer.code != 0 or "tokens" not in said:
        cause = said.get("error") or answer.ending()
        remedy = f"RAYCOMPLETE_TRACEBACK=1 VLLM_LOGGING_LEVEL=INFO python -m raycomplete.doctor.probes engine {device}"
        words = f"vLLM failed at {said.get('begins', 'starting')} ({cause})."
        return fail(words, f"See the imports and free memory above; in full: {remedy}")
    if said["pooled"] != said["tokens"]:
        return fail(
            f"The hidden states predict tokens {said['pooled']}, and the engine generates {said['tokens']}.",
            "Scores of this vLLM would be wrong: install the tested versions with make setup.",
            **said,
        )
    name = "GPU" if device == "gpu" else "processor"
    return ok(
        f"{len(said['tokens'])} tokens generated and read back alike on the {name} (import {said['import_s']:.0f} s, "
        f"pooling engine {said['pooling_s']:.0f} s, generating engine {said['generate_s']:.0f} s, "
        f"{said['peak_bytes'] / 2**30:.1f} GiB).",
        **said,
    )


def _part(context: Context, name: str) -> Finding:
    assert context.config is not None
    question = json.dumps(context.config.model_dump(mode="json"))
    command, environment = (PROBES, "inputs", question), {"HF_HUB_OFFLINE": "1"}
    answer = context.once("inputs", lambda: ask(*command, timeout_s=TIMEOUT_S, environment=environment))
    said = answer.merged.get(name)
    if said is None:
        if "problem" in answer.merged.get("checkpoints", {}):  # prompts need a tokenizer
            return warn("Not looked into without usable checkpoints.", "See the check of the checkpoints.")
        return fail(f"They cannot be read ({answer.ending()}).", "See the check of the imports.")
    if "problem" in said:
        return fail(said["problem"], said["remedy"] or "Mend it and ask again.")
    return ok(said["found"])


def _absent(context: Context) -> list[str]:
    assert context.config is not None
    models = context.config.models
    specs = dict.fromkeys([models.base, models.aligned, student_of(context.config)])
    return [spec for spec in specs if local_folder(spec) is None]
