"""A real vLLM engine on the embedded organism: it starts, reads, generates, and both ways agree."""

from __future__ import annotations

from raycomplete.doctor.child import Answer, ask
from raycomplete.doctor.findings import Context, Finding, fail, ok
from raycomplete.doctor.probe_engine import smoke_spec
from raycomplete.doctor.versions import import_report

TIMEOUT_S = 300.0


def check_engine(context: Context) -> Finding:
    """Starts a pooling engine and a generating one, and compares the token that each predicts."""
    if context.quick:
        return ok("Left out (--quick).")
    devices = import_report(context).merged.get("torch", {}).get("devices", [])
    wanted = context.config.cluster.use_gpu if context.config else "auto"
    use_gpu = bool(devices) and wanted != "never"
    answer = ask(
        "probe_engine",
        "gpu" if use_gpu else "cpu",
        timeout_s=TIMEOUT_S,
        environment=smoke_spec(use_gpu).environment(),
    )
    return _finding(answer, "GPU" if use_gpu else "processor")


def _finding(answer: Answer, device: str) -> Finding:
    said = answer.merged
    if "error" in said or not answer.whole or "tokens" not in said:
        stage = next((m["begins"] for m in reversed(answer.messages) if "begins" in m), "starting")
        cause = said.get("error") or answer.ending(TIMEOUT_S)
        remedy = "RAYCOMPLETE_TRACEBACK=1 VLLM_LOGGING_LEVEL=INFO python -m raycomplete.doctor.probe_engine "
        remedy += "cpu" if device == "processor" else "gpu"
        return fail(f"vLLM failed at {stage} ({cause}).", f"See the imports and free memory above; in full: {remedy}")
    if said["pooled"] != said["tokens"]:
        return fail(
            f"The hidden states predict tokens {said['pooled']}, and the engine generates {said['tokens']}.",
            "Scores of this vLLM would be wrong: install the tested versions with make setup.",
            **said,
        )
    times = {name: said[name] for name in ("import_s", "pooling_s", "generate_s")}
    words = f"{len(said['tokens'])} tokens generated and read back alike on the {device}"
    words += f" (import {times['import_s']:.0f} s, pooling engine {times['pooling_s']:.0f} s, generating engine "
    words += f"{times['generate_s']:.0f} s, {said['peak_bytes'] / 2**30:.1f} GiB)"
    return ok(f"{words}.", **said)
