"""Prompt augmentation: another form of a prompt for the student, while the teachers read the prompt as it is.

What the aligned model refuses as it stands, it may answer with a suffix, in a frame or in other words. The student
reads such a form and learns what the aligned model says to the plain prompt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raycomplete.config import PromptAugmentationConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.prompts import read_rows
from raycomplete.data.samples import RecoverySample
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt

SLOT = "{prompt}"


@dataclass(frozen=True)
class AugmentationFiles:
    """The user's suffixes, templates, and paraphrases by prompt text."""

    suffixes: Sequence[str] = ()
    templates: Sequence[str] = ()
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_augmentation_files(settings: PromptAugmentationConfig, prompts: Sequence[Prompt]) -> AugmentationFiles:
    """Reads the files of `rollout.prompt_augmentation`."""
    suffixes = [str(row["suffix"]) for row in read_rows(settings.suffixes, ("suffix",))] if settings.suffixes else []
    templates = (
        [str(row["template"]) for row in read_rows(settings.templates, ("template",))] if settings.templates else []
    )
    if without := [number for number, template in enumerate(templates, start=1) if SLOT not in template]:
        raise DataError(
            f"The template in row {without[0]} of {settings.templates} has no {SLOT}.",
            f"Write {SLOT} where the prompt belongs.",
        )
    paraphrases: dict[str, list[str]] = {}
    if settings.paraphrases:
        for number, row in enumerate(read_rows(settings.paraphrases, ("prompt", "paraphrases")), start=1):
            texts = row["paraphrases"]
            if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(
                    f"The paraphrases in row {number} of {settings.paraphrases} are no list of texts.",
                    'Write rows such as {"prompt": "...", "paraphrases": ["...", "..."]}.',
                )
            paraphrases.setdefault(str(row["prompt"]).strip(), []).extend(texts)
        if not paraphrases.keys() & {prompt.text for prompt in prompts}:
            raise DataError(
                f"No prompt of {settings.paraphrases} is a training prompt.",
                "Its prompts must stand there word by word as in data.train.",
            )
    return AugmentationFiles(suffixes, templates, paraphrases)


def movable_note(samples: Sequence[RecoverySample]) -> str:
    """Says how many samples have a suffix that an adversary may move, or what to change where there is none."""
    if count := sum(sample.can_move_suffix for sample in samples):
        return f"Recovery samples whose suffix an adversary moves: {count}"
    return (
        "Recovery samples whose suffix an adversary moves: none, so it does nothing. Raise rollout.prompt_augmentation."
        "recovery_fraction, or lower rollout.refusal_prefix_fraction or rollout.mid_answer_fraction"
    )


class PromptAugmenter:
    """Draws other forms of prompts, the same ones for the same seed."""

    def __init__(
        self,
        settings: PromptAugmentationConfig,
        files: AugmentationFiles,
        codec: ChatCodec,
        *,
        seed: int,
        max_tokens: int,
    ) -> None:
        self._settings, self._files, self._codec = settings, files, codec
        self._seed, self._max_tokens = seed, max_tokens

    def augment(self, prompt: Prompt, part: str, sample_id: str) -> tuple[str, tuple[int, ...]]:
        """Returns the kind of change and the tokens of the new form; ("", ()) for a prompt that stays as it is."""
        rng = random.Random(f"{self._seed}:augmentation:{part}:{sample_id}")
        text, files = prompt.text, self._files
        paraphrases = files.paraphrases.get(text, ())
        forms = {
            "random suffix": self._settings.random_suffix_tokens > 0,
            "suffix": bool(files.suffixes),
            "template": bool(files.templates),
            "paraphrase": bool(paraphrases),
        }
        kinds = [kind for kind, is_there in forms.items() if is_there]
        if rng.random() >= self._settings.share_of(part) or not kinds:
            return "", ()
        match kind := rng.choice(kinds):
            case "random suffix":
                new = f"{text} {self._random_suffix(rng)}"
            case "suffix":
                new = f"{text} {rng.choice(files.suffixes)}"
            case "template":
                new = rng.choice(files.templates).replace(SLOT, text)
            case _:
                new = rng.choice(paraphrases)
        token_ids = tuple(prompt.encoded(self._codec, new))
        return (kind, token_ids) if len(token_ids) <= self._max_tokens else ("", ())

    def _random_suffix(self, rng: random.Random) -> str:
        """Text of a drawn number of drawn tokens, those left out that are special or no whole characters."""
        token_ids: list[int] = []
        count = rng.randint(1, self._settings.random_suffix_tokens)
        while len(token_ids) < count:
            token_id = rng.randrange(self._codec.vocab_size)
            text = self._codec.decode([token_id])
            if text.strip() and text.isprintable() and "\ufffd" not in text:
                token_ids.append(token_id)
        return self._codec.decode(token_ids).strip()
