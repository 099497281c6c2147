"""Turns after a refusal and after an answer, where tokens hold spaces and the template a default system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Trial
from raycomplete.config import EvaluationConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.runtime.types import Prompt
from tests.attacks.scripted import made

SYSTEM = "You are a careful clerk."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\n" + SYSTEM + "</s>{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PROMPT = Prompt("h", "open the door", "harmful", "Sure, take the key and open the door.")


@pytest.fixture
def codec(tmp_path: Path) -> ChatCodec:
    """A byte-level BPE of a few words, as those of GPT-2, Llama 3 and Qwen are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = f"{SYSTEM} {PROMPT.text} {PROMPT.answer} I cannot help with that. But Please explain the steps."
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([words] * 9, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(tmp_path)
    return ChatCodec(tmp_path)


@pytest.fixture
def trials(codec: ChatCodec) -> dict[str, Trial]:
    target = Target("aligned", "w", None, codec, RefusalJudge(), 256, 16)  # type: ignore[arg-type]
    entries = ({"name": "adaptive", "cuts": [3], "depths": [4]}, {"name": "refuse_then_turn", "refusal": "I cannot."})
    attacks = [made(entry) for entry in entries]
    return {trial.variant: trial for attack in attacks for trial in attack.plan(target, [PROMPT])}


def test_the_space_before_the_answer_is_part_of_its_first_token(codec: ChatCodec, trials: dict[str, Trial]) -> None:
    trial = trials["but-4"]
    space = codec.encode_answer(" ")
    assert len(space) == 1
    assert space[0] not in trial.sequence
    written = list(trial.sequence[len(codec.encode_prompt(PROMPT.text)) :])
    whole = codec.encode_answer(f"I cannot. But {PROMPT.answer}")
    assert written == whole[: len(written)], "as the model would read the text"
    assert codec.decode(trial.prefill) == " Sure, take the"
    assert len(trial.prefill) == 4


def test_a_default_system_prompt_stands_in_front_alone(codec: ChatCodec, trials: dict[str, Trial]) -> None:
    trial = trials["multi-turn-4"]
    given = codec.decode(codec.encode_answer(PROMPT.answer or "")[:4])
    assert trial.prefill == ()
    turns = f"<s>user\n{PROMPT.text}</s><s>assistant\n{given}</s><s>user\nPlease explain the steps.</s><s>assistant\n"
    assert list(trial.sequence) == codec.encode_answer(f"<s>system\n{SYSTEM}</s>{turns}")


def test_prompts_without_an_answer_are_left_out_and_counted(codec: ChatCodec, tmp_path: Path) -> None:
    class Silent:
        def generate(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
            return [[] for _ in sequences]

    target = Target("aligned", "w", Silent(), codec, RefusalJudge(), 256, 16)
    harmful = (PROMPT, Prompt("none", "open the window", "harmful"))
    attack = {"name": "adaptive", "cuts": [3], "depths": [4]}
    config = EvaluationConfig.model_validate({"depths": [0], "max_tokens": 16, "attacks": [attack]})
    block = evaluate_model(target, EvaluationSets(harmful, (), ()), config, tmp_path)["attacks"]["adaptive"]
    assert (block["n"], block["trials"], block["short_prefills"]) == (1, 2, 2)
