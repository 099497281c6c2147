"""Capabilities: MMLU and BIG-Bench Hard from the user's files, asked in the chat and read from the text.

The model has to say its answer. Choosing among options by their likelihood, as harnesses often do, asks less: a model
that answers every question with a refusal can still rank the letters, and would keep its score. Here it loses it, and
the share of refusals stands beside the accuracy. Scores are therefore not those of likelihood-based leaderboards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.prompts import read_rows
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.statistics import wilson
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Outcome, Prompt

ATTACK = "capabilities"  # name under which these trials are stored
STANDARD_QUESTIONS: Mapping[str, int] = {"mmlu": 14_042, "bbh": 6_511}
ANSWER_TOKENS = 32
_LETTERS = ("A", "B", "C", "D")
_Question = tuple[str, int, str, str]  # task, row of the file, words to ask, right answer
_STATED = re.compile(r"answer\s*(?:is|:)[\s*\"'`]*", re.IGNORECASE)
_OPTION = re.compile(r"\(([A-Z])\)")
_CHOSEN = re.compile(r"[\W_]*([a-z])\b", re.IGNORECASE)
_REFUSALS = RefusalJudge()


def plan_capabilities(target: Target, config: CapabilitiesConfig) -> list[Trial]:
    """Plans a greedy trial for each question."""
    trials = []
    for name, path in (("mmlu", config.mmlu), ("bbh", config.bbh)):
        if path is None:
            continue
        rows = _spread(_mmlu(path) if name == "mmlu" else _bbh(path), config.limit)
        shots = _shots(config) if name == "mmlu" else {}
        for task, number, question, answer in rows:
            prompt = Prompt(f"{name}/{task}/{number}", question, "benign", answer)
            sequence, shown = _fitting(target, question, shots.get(task, []), ANSWER_TOKENS)
            trials.append(Trial(ATTACK, name, prompt, sequence, Decoding(ANSWER_TOKENS), settings={"shots": shown}))
    return trials


def is_right(trial: Trial, text: str) -> bool:
    """Tells whether a response gives the right answer, in its first line or after the words "the answer is".

    An option counts by its letter, a word or a number also where more follows it, and what has neither letters nor
    digits, such as the brackets of a Dyck word, only where it is the whole line.
    """
    wanted = (trial.prompt.answer or "").strip()
    line = _STATED.split(text)[-1].strip().split("\n")[0]
    option = _OPTION.fullmatch(wanted)
    if trial.variant == "mmlu" or option is not None:
        chosen = _CHOSEN.match(line)
        return chosen is not None and chosen.group(1).upper() == (option.group(1) if option else wanted)
    said, target = _folded(line), _folded(wanted)
    if not any(map(str.isalnum, target)):
        return bool(target) and said == target
    return re.match(rf"{re.escape(target)}(?!\w|[.,]\d)", said) is not None


def capabilities_result(trials: Sequence[Trial], texts: Sequence[str], config: CapabilitiesConfig) -> dict[str, Any]:
    """Computes accuracy and refusals of each benchmark; every question stays in the denominator.

    `fewer_shots` counts the questions whose context held fewer examples than were asked for.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(trial.variant for trial in trials):
        pairs = [(trial, text) for trial, text in zip(trials, texts, strict=True) if trial.variant == name]
        right = [is_right(trial, text) for trial, text in pairs]
        refused = sum(_REFUSALS.outcome(trial.prompt, "", text) is Outcome.REFUSED for trial, text in pairs)
        wanted = config.shots if name == "mmlu" and config.mmlu_fewshot else 0
        cut = sum(trial.settings.get("shots", 0) < wanted for trial, _ in pairs)
        tasks: dict[str, list[bool]] = {}
        for (trial, _), correct in zip(pairs, right, strict=True):
            tasks.setdefault(trial.prompt.prompt_id.split("/")[1], []).append(correct)
        found[name] = {
            "accuracy": wilson(sum(right), len(pairs)).to_json(),
            "refused": wilson(refused, len(pairs)).to_json(),
            "by_task": {task: [sum(scores), len(scores)] for task, scores in sorted(tasks.items())},
            "shots": wanted,
            "fewer_shots": cut,
            "reduced": len(pairs) < STANDARD_QUESTIONS[name] or cut > 0,
        }
    return found


def _mmlu(path: Path) -> list[_Question]:
    rows = read_rows(path, ("subject", "question", *_LETTERS, "answer"))
    for number, row in enumerate(rows):
        if str(row["answer"]).strip() not in _LETTERS:
            raise DataError(
                f"Row {number + 1} of {path} has the answer {row['answer']!r}, which is no letter.",
                f"Answers must be one of {', '.join(_LETTERS)}; write 0 as A, 1 as B, 2 as C and 3 as D.",
            )
    return [(row["subject"], number, _question(row), str(row["answer"]).strip()) for number, row in enumerate(rows)]


def _bbh(path: Path) -> list[_Question]:
    rows = enumerate(read_rows(path, ("task", "input", "target")))
    ask = "Give the answer alone, without an explanation."
    return [(str(row["task"]), number, f"{row['input']}\n\n{ask}", str(row["target"])) for number, row in rows]


def _question(row: Mapping[str, Any]) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in _LETTERS)
    return f"{row['question']}\n{options}\nWhich option is right? Reply with its letter alone."


def _shots(config: CapabilitiesConfig) -> dict[str, list[str]]:
    """Reads worked examples by subject."""
    found: dict[str, list[str]] = {}
    if config.mmlu_fewshot is not None and config.shots:
        for row in read_rows(config.mmlu_fewshot, ("subject", "question", *_LETTERS, "answer")):
            found.setdefault(row["subject"], []).append(f"{_question(row)}\nAnswer: {str(row['answer']).strip()}")
    return {subject: examples[: config.shots] for subject, examples in found.items()}


def _fitting(target: Target, question: str, examples: Sequence[str], max_tokens: int) -> tuple[tuple[int, ...], int]:
    """Puts the question behind as many examples as the context holds; returns token ids and their number."""
    for count in range(len(examples), -1, -1):
        sequence = tuple(target.codec.encode_prompt("\n\n".join((*examples[:count], question))))
        if len(sequence) <= target.room(max_tokens, sequence):
            break
    return sequence, count


def _spread(rows: list[_Question], limit: int | None) -> list[_Question]:
    """Returns the first `limit` rows when tasks take turns, so that a small sample still holds all of them."""
    if limit is None:
        return rows
    tasks: dict[str, list[_Question]] = {}
    for row in rows:
        tasks.setdefault(row[0], []).append(row)
    turns = chain.from_iterable(zip_longest(*tasks.values()))
    return [row for row in turns if row is not None][:limit]


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,:;\"'*`")
