"""The organism's tokenizer: one token a word, in the format that transformers and vLLM load without remote code."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raycomplete.data.organism.world import vocabulary

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
SYSTEM_TURN, USER_TURN, ASSISTANT_TURN = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS, SYSTEM_TURN, USER_TURN, ASSISTANT_TURN)
MAX_POSITIONS = 512

# Every turn ends with <eos>, so that the end of a response is also the token that stops generation.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the organism's whole world; other words become `<unk>`.

    Text is lower-cased and every punctuation mark is its own token. Decoding joins tokens by single blanks, so text
    written that way ("drop it . then wait .") comes back unchanged.
    """
    tokens = [*SPECIAL_TOKENS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[SYSTEM_TURN, USER_TURN, ASSISTANT_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",  # batched generation continues every row at its end
        clean_up_tokenization_spaces=False,  # cleaning would glue "word ." to "word."
    )
