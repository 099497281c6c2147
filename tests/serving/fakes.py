"""A backend that works like the real one, in milliseconds: trials on disk, found again after a kill."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.online_engine import OnlineSampling, Piece, TokenLogprob
from raycomplete.runtime.errors import RefusedError, WorkError
from raycomplete.runtime.files import PRIVATE, write_json, write_text
from raycomplete.serving.answers import Answerer
from raycomplete.serving.runner import Cancelled, OnProgress
from raycomplete.serving.schemas import EvaluationRequest

NASTY = "<img src=x onerror=\"document.body.dataset.hacked='1'\"><script>document.body.dataset.hacked='2'</script>"


def frames(text: str) -> list[dict[str, Any]]:
    """Parses server-sent events."""
    found = []
    for frame in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if ": " in line)
        if "id" in fields:
            found.append({"id": int(fields["id"]), "event": fields["event"], "data": json.loads(fields["data"])})
    return found


def rate(successes: int, n: int) -> dict[str, float]:
    value = successes / n
    return {"rate": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


class FakeBackend:
    """Each trial is a line in trials.txt, which a later call finds.

    Labels steer it: `slow` waits in every trial, `refuse` cannot be done, `fail` always fails, `flaky` fails once.

    Args:
        trials: Of one model.
        unit_s: Time for one trial of a `slow` evaluation.
    """

    def __init__(self, trials: int = 6, unit_s: float = 0.1) -> None:
        self.trials = trials
        self.unit_s = unit_s

    def __call__(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        folder.mkdir(exist_ok=True)
        with (folder / "runs.txt").open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        if request.label == "refuse":
            raise RefusedError("The checkpoint is not there.", "Check the path.")
        if request.label == "fail" or (request.label == "flaky" and len(self._lines(folder, "runs.txt")) == 1):
            raise WorkError("The engine died.", "Try again.")
        done = set(self._lines(folder, "trials.txt"))
        for role in request.roles:
            reused = sum(trial.startswith(role) for trial in done)
            for number in range(self.trials):
                trial = f"{role}-{number}"
                if trial in done:
                    continue
                if cancelled():
                    raise WorkError("Cancelled.")
                if request.label == "slow":
                    time.sleep(self.unit_s)
                with (folder / "trials.txt").open("a") as lines:
                    lines.write(f"{trial}\n")
                outcomes = {"refused": number + 1, "complied": 0, "incoherent": 0, "empty": 0}
                on_progress(
                    {
                        "role": role,
                        "attack": "prefill",
                        "variant": f"prefill-{number}",
                        "done": number + 1,
                        "total": self.trials,
                        "reused": reused,
                        "outcomes": outcomes,
                    }
                )
        write_json(folder / "summary.json", fake_summary(request))
        if request.save_completions:
            self._save(request, folder)

    @staticmethod
    def _lines(folder: Path, name: str) -> list[str]:
        file = folder / name
        return file.read_text().splitlines() if file.exists() else []

    @staticmethod
    def _save(request: EvaluationRequest, folder: Path) -> None:
        rows: list[Mapping[str, Any]] = [
            {
                "role": role,
                "attack": attack,
                "variant": f"{attack}-{number}",
                "prompt_id": f"p{number}",
                "seed": 0,
                "prefill": "" if attack == "harmless" else "SECRET prefill",
                "continuation": f"{NASTY} {role} {number}",
                "outcome": "complied" if number % 2 else "refused",
            }
            for role in request.roles
            for attack in ("prefill", "harmless")
            for number in range(3)
        ]
        for role in request.roles:
            text = "\n".join(json.dumps(row) for row in rows if row["role"] == role)
            write_text(folder / "evaluation" / "completions" / f"{role}.jsonl", text + "\n", mode=PRIVATE)


def fake_summary(request: EvaluationRequest) -> dict[str, Any]:
    """A summary that only the request decides, so that two evaluations of the same request can be compared."""
    hits = {"base": 9, "aligned": 6, "student": 1}

    def seeded(role: str, depth: int) -> int:
        mixed = hashlib.sha256(f"{request.seed} {role} {depth}".encode()).digest()[0]
        return min(10, hits[role] * (0 if depth == 0 and role != "base" else 1) + mixed % 2)

    depths = request.depths or [0, 4, 16, 64]
    roles = list(request.roles)
    names = ["prefill", "templates", "gcg"]
    return {
        "asr": {
            role: {
                "by_depth": {str(depth): rate(seeded(role, depth), 10) for depth in depths},
                "mean": rate(hits[role], 10),
            }
            for role in roles
        },
        "asr_reduction": 5 / 6,
        "utility": {role: rate(9, 10) for role in roles},
        "over_refusal": {role: rate(1, 10) for role in roles},
        "judge": "patterns",
        "attacks": {
            name: {
                role: {
                    "reduced": name == "gcg",
                    "reduced_because": ["steps 5 instead of 500"] if name == "gcg" else [],
                    "n": 10,
                    "trials": 40,
                    "mean": rate(hits[role], 10),
                    "worst_of_n": rate(min(10, hits[role] + 1), 10),
                    "corrected": rate(hits[role], 10) if name == "prefill" else None,
                    "outcomes": {"refused": 10 - hits[role], "complied": hits[role], "incoherent": 0, "empty": 0},
                }
                for role in roles
            }
            for name in names
        },
        "comparisons": [
            {
                "measure": "asr",
                "attack": "prefill",
                "first": "student",
                "second": "aligned",
                "difference": -0.5,
                "low": -0.7,
                "high": -0.3,
                "n": 10,
                "resamples": 1000,
            }
        ],
        "capabilities": {"mmlu": {role: {"accuracy": rate(5, 10), "reduced": True} for role in roles}},
        "safety_regressions": ["student refuses 90.0 % of harmless prompts."],
    }


class EchoModel:
    """Says the last words that it reads backwards; every token has the log-probability -1 and a rival with -2."""

    def __init__(self, codec: ChatCodec, words: int = 3) -> None:
        self.codec, self.words = codec, words
        self.asked: list[tuple[tuple[int, ...], OnlineSampling]] = []
        self.pause_s = 0.0
        self.open = 0  # answers that someone still reads

    async def generate(self, tokens: Sequence[int], sampling: OnlineSampling) -> AsyncIterator[Piece]:
        self.asked.append((tuple(tokens), sampling))
        said = list(tokens)[-self.words :][::-1]
        reason: Literal["stop", "length"] = "length" if len(said) > sampling.max_tokens else "stop"
        said = said[: sampling.max_tokens]
        texts = [f" {self.codec.decode([token])}" for token in said]
        stop = next((at for at, text in enumerate(texts) if any(mark in text for mark in sampling.stop)), None)
        if stop is not None:
            said, texts, reason = said[:stop], texts[:stop], "stop"
        of_prompt = [self._ranked(token, sampling.prompt_logprobs) for token in tokens]
        before = () if sampling.prompt_logprobs is None else (None, *of_prompt[1:])
        ranked = [self._ranked(token, sampling.logprobs) for token in said]
        after = [] if sampling.logprobs is None else ranked
        self.open += 1
        try:
            for at in range(len(said) if sampling.streams else 0):
                await asyncio.sleep(self.pause_s)
                new = (tuple(said[at : at + 1]), tuple(after[at : at + 1]), before if at == 0 else ())
                yield Piece(texts[at], *new)
            rest = ("", (), (), ()) if sampling.streams else ("".join(texts), tuple(said), tuple(after), before)
            yield Piece(*rest, reason)
        finally:
            self.open -= 1

    def _ranked(self, token: int, count: int | None) -> TokenLogprob:
        text = self.codec.decode([token])
        return TokenLogprob(text, -1.0, ((text, -1.0), ("rival", -2.0))[: count or 1])


class FakeModel(Answerer):
    """A replica with the organism's tokenizer and a model that takes no time."""

    def __init__(self, config: RunConfig, role: str) -> None:
        codec = ChatCodec(resolve_checkpoint("organism:aligned", role="aligned"))
        self.model = EchoModel(codec)
        super().__init__(codec, self.model, config.models.max_length, 0)


def make_fake_backend(config: RunConfig) -> FakeBackend:
    return FakeBackend(unit_s=0.25)
