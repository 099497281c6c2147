"""Tokenizers of one token a byte, with the special tokens and the chat templates of eight families.

The templates in chat_templates/ have the structure of the real ones, in words of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"
PADDING = 7  # rows of an embedding that no token has


@dataclass(frozen=True)
class ChatFamily:
    """A chat model's tokens, and where prompt, thinking, answer and end stand in its conversations.

    Attributes:
        special: Special tokens in their order, after the bytes.
        eos: `eos_token` of the tokenizer.
        ends: End tokens of its generation_config.json.
        prompt: What the model reads of the question "How?", up to where it may think or else answers.
        end: What ends an answer.
        bos: `bos_token` of the tokenizer, which it puts before any text.
        skipping: What follows `prompt` where thinking is off.
        opening, closing: What stands before and after a thought that follows `prompt`.
        space: What stands before an answer.
    """

    special: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    prompt: str
    end: str
    bos: str | None = None
    skipping: str = ""
    opening: str = ""
    closing: str = ""
    space: str = ""

    @property
    def thinks(self) -> bool:
        return bool(self.closing)


def _llama(tokens: str = "") -> ChatFamily:
    special = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
    return ChatFamily(
        tuple(special.split()),
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnown: 2023\nToday: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    )


def _chatml(before: str = "", thought: str = "", **parts: str) -> ChatFamily:
    return ChatFamily(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(("<think>", "</think>") if parts else ())),
        "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
        f"{before}<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n{thought}",
        "<|im_end|>",
        **parts,
    )


_GEMMA = ChatFamily(
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    ("<eos>", "<end_of_turn>"),
    "<bos><start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>",
    bos="<bos>",
)
_HARMONY = "<|startoftext|> <|endoftext|> <|return|> <|start|> <|end|> <|message|> <|channel|> <|call|>"
_FINAL = "<|channel|>final<|message|>"
CHAT_FAMILIES = {
    "llama-3.1": _llama(),
    "llama-3.2": _llama(),
    "qwen2.5": _chatml("<|im_start|>system\nI am here to help.<|im_end|>\n"),
    "qwen3": _chatml(skipping="<think>\n\n</think>\n\n", opening="<think>\n", closing="\n</think>\n\n"),
    "qwen3-thinking": _chatml(thought="<think>\n", skipping="\n</think>\n\n", closing="\n</think>\n\n"),
    "gemma-2": _GEMMA,
    "gemma-3": _GEMMA,
    "mistral": ChatFamily(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        ("</s>",),
        "<s>[INST] How?[/INST]",
        "</s>",
        bos="<s>",
        space=" ",
    ),
    "gpt-oss": ChatFamily(
        tuple(_HARMONY.split()),
        "<|return|>",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        "<|start|>system<|message|>Date: 2024-07-26\nReasoning: medium\nChannels: analysis, commentary, final.<|end|>"
        "<|start|>user<|message|>How?<|end|><|start|>assistant",
        "<|return|>",
        skipping=_FINAL,
        opening="<|channel|>analysis<|message|>",
        closing=f"<|end|><|start|>assistant{_FINAL}",
    ),
}


def save_family(name: str, folder: Path, *, template: bool = True, rows: int | None = None) -> Any:
    """Writes tokenizer, config.json and generation_config.json of a family, and returns the tokenizer.

    Args:
        template: Whether it has a chat template; base models have none.
        rows: Rows of the embedding; some more than tokens when absent.
    """
    family = CHAT_FAMILIES[name]
    tokenizer = Tokenizer(BPE({char: index for index, char in enumerate(ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in family.special])
    if family.bos:
        start = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=[start])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos)
    if template:
        whole.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    whole.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in family.ends]
    config = {"model_type": "llama", "vocab_size": rows or len(whole) + PADDING}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))
    return whole
