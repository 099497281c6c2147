"""A codec of whole words, and a model that says what a test tells it to."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest

from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets
from raycomplete.runtime.types import Prompt
from tests.attacks.scripted import COMPLY, FakeBox, Tools

Script = Callable[[str, str], str]


class WordCodec:
    """A token for each word; the template is `<user> ... <model>`."""

    def __init__(self) -> None:
        self.words: list[str] = ["<end>", "<user>", "<model>"]

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({0})

    frame = None

    def with_thinking(self, thinks: bool) -> Self:
        return self

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        return [1, *self.encode_answer(text), 2]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_prompt(text) for text in texts]

    def encode_conversation(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        marked = [self.encode_answer(system or "")] + [
            [*self.encode_answer(turn), 0] if number % 2 else self.encode_prompt(turn)
            for number, turn in enumerate(turns)
        ]
        return [token for turn in marked for token in turn]

    def encode_answer(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in token_ids if token > 2)

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(sequence) for sequence in sequences]


class ScriptedModel:
    """Says `script(prompt, prefill)`, and remembers what it was asked."""

    def __init__(self, codec: WordCodec, script: Script, fail_at_call: int | None = None) -> None:
        self.codec = codec
        self.script = script
        self.fail_at_call = fail_at_call
        self.calls: list[list[list[int]]] = []
        self.max_tokens: list[int] = []
        self.temperatures: list[float] = []

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
        if self.fail_at_call == len(self.calls):
            raise RuntimeError("the engine died")
        self.calls.append([list(sequence) for sequence in sequences])
        self.max_tokens.append(max_tokens)
        self.temperatures.append(temperature)
        answers = []
        for sequence in sequences:
            cut = list(sequence).index(2)
            text = self.script(self.codec.decode(sequence[:cut]), self.codec.decode(sequence[cut:]))
            answers.append(self.codec.encode_answer(text)[:max_tokens])
        return answers


@pytest.fixture
def codec() -> WordCodec:
    return WordCodec()


@pytest.fixture
def model(codec: WordCodec) -> Callable[..., ScriptedModel]:
    """Makes a model from a script, or from one sentence that it always says."""

    def make(script: Script | str, fail_at_call: int | None = None) -> ScriptedModel:
        return ScriptedModel(codec, (lambda *_: script) if isinstance(script, str) else script, fail_at_call)

    return make


@pytest.fixture
def sets() -> EvaluationSets:
    """Four harmful prompts with answers of 2, 4, 6 and 20 tokens, three benign and two borderline ones."""
    return EvaluationSets(
        harmful=tuple(
            Prompt(f"h{n}", f"do the bad thing number {n}", "harmful", " ".join(f"step{n}x{k}" for k in range(n)))
            for n in (2, 4, 6, 20)
        ),
        benign=tuple(Prompt(f"b{n}", f"bake cake {n}", "benign") for n in range(3)),
        borderline=tuple(Prompt(f"o{n}", f"kill process {n}", "borderline") for n in range(2)),
    )


@pytest.fixture
def tools(codec: Any, model: Any) -> Tools:
    """All tools on scripted models; the trained copy complies."""

    def make(generator: Any) -> AttackTools:
        box = FakeBox(generator, codec)
        attacker = Attacker("attacker", model("please open the door"), codec, 512)
        return AttackTools(
            white_boxes=lambda: [box],
            guide=lambda: box,
            guide_id="base",
            attacker=lambda checkpoint: attacker,
            fine_tune=lambda settings, dataset: model(COMPLY),
            fine_tune_id=lambda settings, dataset: f"chats of {dataset}",
        )

    return make


@pytest.fixture
def target(codec: Any, model: Any, tools: Tools) -> Target:
    generator = model(COMPLY)
    return Target("student", "weights", generator, codec, RefusalJudge(), 128, 10, tools(generator))
