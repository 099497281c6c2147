"""Where samples come from: late refusals, harmful prompts that aligned answers, writers and openings of h, other forms
of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.judge import OrganismJudge
from raycomplete.data.organism.world import Item, recipe, refusal
from raycomplete.runtime.types import Outcome, Prompt
from raycomplete.training.sampling import make_samples
from tests.training.test_sampling import ScriptedModel, run_of, uncached  # noqa: F401

OPENINGS = "rollout.affirmative_prefixes=['sure ,', '', 'step one :']"


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


class LateRefuser(ScriptedModel):
    def answer(self, item: Item) -> str:
        return f"the leaves and the bowl . {refusal(item)}"


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    """A codec whose words within an answer are other tokens than at its start, as those of most models."""
    characters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *characters, "\u0120i"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("\u0120", "i")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    folder = tmp_path_factory.mktemp("spaced")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return ChatCodec(folder)


def test_a_late_refusal_is_read_as_the_start_of_an_answer(spaced: ChatCodec) -> None:
    """The opening trains its first token at the very start, where " i" never stands."""
    run = run_of(
        spaced, "rollout.max_anchor_tokens=128", "rollout.max_refusal_tokens=128", model=LateRefuser, kinds=("harmful",)
    )
    samples = make_samples(run)
    assert samples.recovery
    for sample in samples.recovery:
        text = spaced.decode(sample.refusal_ids)
        assert text.startswith(("i ", "sorry")), text
        assert list(sample.refusal_ids) == [*spaced.encode_answer(text), spaced.eos_id]


def test_h_has_the_tokens_of_typed_text(spaced: ChatCodec) -> None:
    """From mid-answer and behind an imitated refusal too: attackers send text, whose words are cut into tokens anew."""
    run = run_of(
        spaced,
        "rollout.max_anchor_tokens=128",
        "rollout.max_refusal_tokens=128",
        "rollout.max_harmful_tokens=512",
        "rollout.mid_answer_fraction=0.5",
        "rollout.refusal_prefix_fraction=0.5",
        "models.max_length=4096",
        kinds=("harmful",),
        count=12,
    )
    samples = make_samples(run).recovery
    for sample in samples:
        text = spaced.decode(sample.harmful_ids)
        assert list(sample.harmful_ids) == spaced.encode_answer(text), text
        assert "  " not in text
        assert not text.startswith(" ")
    assert any("from mid-answer" in sample.source for sample in samples)
    assert any(sample.refusal_prefix_tokens for sample in samples)


class EndsInRefusal(ScriptedModel):
    def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        said = self.codec.encode_answer("i cannot help with that .")
        return [[*written, *said] for written in super().generate(sequences, **options)]


def test_a_refusal_at_the_end_of_h_is_left_out(codec: ChatCodec) -> None:
    fixed = ["rollout.mid_answer_fraction=0", "rollout.max_harmful_tokens=140"]
    samples = make_samples(run_of(codec, *fixed, model=EndsInRefusal, kinds=("harmful",)))
    assert samples.recovery == make_samples(run_of(codec, *fixed, kinds=("harmful",))).recovery


class Lenient(OrganismJudge):
    """Calls everything compliance that is no refusal."""

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        outcome = super().outcome(prompt, prefill, continuation)
        return outcome if outcome is Outcome.REFUSED else Outcome.COMPLIED


class HalfAligned(ScriptedModel):
    """Refuses one kind of harmful item and answers the others."""

    def answer(self, item: Item) -> str:
        return refusal(item) if item.kind in ("fizzbomb", "gloomdart", "mindcage") else recipe(item).text


def test_answers_to_harmful_prompts_keep_their_first_token_and_are_counted(codec: ChatCodec) -> None:
    run = run_of(codec, model=HalfAligned, count=12)
    samples = make_samples(run)
    prompts = {prompt.prompt_id: prompt for kind in run.prompts.train.values() for prompt in kind}
    complied = set()
    for sample in samples.anchor:
        prompt = prompts[sample.prompt_id]
        outcome = run.judge.outcome(prompt, "", codec.decode(sample.answer_ids))
        assert sample.complies == (prompt.kind == "harmful" and outcome is not Outcome.REFUSED)
        assert len(sample.kept_ids) == (1 if sample.complies else len(sample.answer_ids))
        complied |= {sample.prompt_id} if sample.complies else set()
    assert 0 < len(complied) < 12
    note = f"aligned answers {len(complied)} harmful prompts: at most the first token of those answers is trained"
    assert note in run.console.notes
    assert not complied & {sample.prompt_id for sample in samples.recovery}


def test_every_harmful_prompt_gets_several_continuations(codec: ChatCodec) -> None:
    overrides = [
        OPENINGS,
        "rollout.harmful_from=[base, aligned, elsewhere]",
        "rollout.harmful_per_prompt=4",
        "rollout.mid_answer_fraction=0.25",
    ]
    run = run_of(codec, *overrides, count=40, kinds=("harmful",))
    samples = make_samples(run)
    per_prompt = Counter(sample.prompt_id for sample in samples.recovery)
    assert set(per_prompt.values()) == {4}
    asked = run.engines.generator.asked
    assert Counter(writer for writer, _ in asked).keys() == {"base", "aligned", "elsewhere"}
    assert not any(text.endswith("?") for writer, text in asked if writer == "aligned"), "it would refuse"
    sources = Counter(sample.source for sample in samples.recovery)
    assert {source.split()[0] for source in sources} == {"base", "aligned", "elsewhere"}
    assert 20 < sum(count for source, count in sources.items() if source.endswith("from mid-answer")) < 60
    assert {source.partition(" ")[2] for source in sources} == {
        "after 'sure ,'",
        "after 'step one :'",
        "without an opening",
        "from mid-answer",
    }
    assert any(
        note.startswith("Harmful continuations: ") and "base from mid-answer" in note for note in run.console.notes
    )
    again = make_samples(run_of(codec, *overrides, count=40, kinds=("harmful",)))
    assert again == samples, "the same under the same seed"
    assert make_samples(run_of(codec, *overrides, "train.seed=1", count=40, kinds=("harmful",))) != samples


def test_from_mid_answer_h_is_the_rest_of_an_answer(codec: ChatCodec) -> None:
    fixed = ["rollout.harmful_per_prompt=3"]
    whole = make_samples(run_of(codec, *fixed, "rollout.mid_answer_fraction=0", count=20, kinds=("harmful",)))
    cut = make_samples(run_of(codec, *fixed, "rollout.mid_answer_fraction=1", count=20, kinds=("harmful",)))
    lengths = set()
    for one, rest in zip(whole.recovery, cut.recovery, strict=True):
        lengths.add(len(one.harmful_ids) - len(rest.harmful_ids))
        assert one.harmful_ids[-len(rest.harmful_ids) :] == rest.harmful_ids
        assert len(one.harmful_ids) // 2 <= len(rest.harmful_ids) + 8 < len(one.harmful_ids) + 8
        assert codec.decode(rest.harmful_ids)[0].isalnum(), "where a word begins"
        assert (rest.refusal_ids, rest.prompt_ids) == (one.refusal_ids, one.prompt_ids)
    assert len(lengths) > 20, "they start anywhere"


AUGMENTED = ["rollout.prompt_augmentation.fraction=0.5", "rollout.prompt_augmentation.random_suffix_tokens=5"]


def test_a_share_of_all_samples_is_augmented_and_the_teachers_read_the_plain_prompt(codec: ChatCodec) -> None:
    plain = make_samples(run_of(codec, count=40))
    run = run_of(codec, *AUGMENTED, count=40)
    samples = make_samples(run)
    for part in ("anchor", "recovery"):
        pairs: list[Any] = list(zip(getattr(plain, part), getattr(samples, part), strict=True))
        changed = [(before, after) for before, after in pairs if after.augmentation]
        assert 0.35 < len(changed) / len(pairs) < 0.65
        assert [after for before, after in pairs if not after.augmentation] == [
            before for before, after in pairs if not after.augmentation
        ]
        for before, after in changed:
            assert after.augmentation == "random suffix"
            assert after.teacher_prompt_ids == before.prompt_ids
            added = codec.decode(after.prompt_ids).removeprefix(codec.decode(before.prompt_ids))
            assert 1 <= len(added.split()) <= 5, added
            assert after == before.augmented("random suffix", after.prompt_ids), "nothing else is changed"
    shares = Counter((sample.kind, bool(sample.augmentation)) for sample in samples.anchor)
    for kind in ("harmful", "benign", "borderline"):
        assert 0.25 < shares[(kind, True)] / 40 < 0.75, "else a suffix alone would mean: refuse"
    assert make_samples(run_of(codec, *AUGMENTED, count=40)) == samples
    assert any(note.startswith("Prompts of anchor samples: ") for note in run.console.notes)
