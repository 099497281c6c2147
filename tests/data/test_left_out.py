"""Prompts that are left out are counted, by file, in the notes at the start of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raycomplete.config import parse
from raycomplete.data.inputs import prepare_alignment_prompts, prepare_prompts
from tests.attacks.fixtures import WordCodec


def source(path: Path, *texts: str) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"prompt": text, "answer": "so"}) + "\n" for text in texts))
    return {"path": str(path), "answer": "answer", "max_characters": 20}


def test_rows_longer_than_max_characters_are_counted_by_file(tmp_path: Path) -> None:
    short = {kind: source(tmp_path / f"{kind}.jsonl", kind) for kind in ("harmful", "benign", "borderline")}
    two = source(tmp_path / "two.jsonl", "steal a loaf", "steal two loaves of bread", "steal three loaves of bread")
    one = source(tmp_path / "one.jsonl", "bake a loaf", "bake two loaves of bread")
    tree = {
        "models": {"base": "base", "aligned": "aligned"},
        "data": {
            "train": {"harmful": [two], "benign": [one]},
            "evaluation": {kind: [row] for kind, row in short.items()},
        },
        "align": {"refusals": [two], "benign": [one]},
    }
    config, counted = parse(tree, "test"), "Prompts left out, longer than max_characters:"
    prompts = prepare_prompts(config, WordCodec())  # type: ignore[arg-type]
    assert [prompt.text for prompt in prompts.train["harmful"]] == ["steal a loaf"]
    assert prompts.notes == (f"{counted} 2 of {two['path']}, 1 of {one['path']}",)
    assert prepare_alignment_prompts(config).notes == prompts.notes
    assert prepare_prompts(config, WordCodec(), training=False).notes == (), "nothing else is read"  # type: ignore[arg-type]

    long = source(tmp_path / "benign.jsonl", "benign", "a benign prompt that is longer", "another of the same length")
    tree["data"]["evaluation"]["benign"] = [long]
    again = prepare_prompts(parse(tree, "test"), WordCodec(), training=False)  # type: ignore[arg-type]
    assert again.notes == (f"{counted} 2 of {long['path']}",)
