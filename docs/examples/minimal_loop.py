"""Anchor, recovery and push-forward in one file: completes the alignment of the model organism in plain PyTorch.

    python docs/examples/minimal_loop.py        # 40 seconds of processor time

It reads top to bottom. Where it differs from `raycomplete train`: transformers generates and scores in place of vLLM,
one process trains without Ray and DeepSpeed, batches are padded instead of packed, no measurement steers the loss
weights, and there are no checkpoints. The loss is the same, `rc.losses.distillation_loss`.

x prompt, y answer of the aligned model, h compliant beginning by base, r refusal by the aligned model; B batch, T
tokens, H hidden, N token rows of the loss.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import raycomplete as rc
from raycomplete.data import organism
from raycomplete.data.organism.build import measure
from raycomplete.data.organisms import ORGANISMS
from raycomplete.losses import Head, HiddenStates, LossInputs, LossSettings
from raycomplete.runtime.types import PromptKind

BATCH_SIZE = 12  # prompts of each kind in a step
MAX_DEPTH = 80  # tokens of h, of which the cut takes some
PROMPTS_PER_KIND = 64
TERMS = {"anchor": 1.0, "recovery": 1.0, "push_forward": 1.0}
DEPTHS = (0, 4, 16, 64)

Tokens = list[int]
Span = tuple[int, int, int]  # sequence of a batch, position of the first predicted token, number of them


def load(role: Literal["base", "aligned"]) -> LlamaForCausalLM:
    """One of the organism's two checkpoints, frozen."""
    return LlamaForCausalLM.from_pretrained(organism.checkpoint_path(role)).float().eval().requires_grad_(False)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tokens], max_tokens: int
) -> list[Tokens]:
    """One answer to each prompt at temperature 1, up to and with its end token."""
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    tokens_BT = model.generate(**batch, max_new_tokens=max_tokens, do_sample=True, top_k=0)
    answers = tokens_BT[:, batch["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def hidden(model: LlamaForCausalLM, sequences: Sequence[Tokens], spans: Sequence[Span]) -> Tensor:
    """Final hidden states [N, H] that predict the tokens of the spans, in order."""
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    hidden_BTH = model.model(ids_BT).last_hidden_state  # padding stands on the right, so no real token reads it
    return torch.cat([hidden_BTH[b, start - 1 : start - 1 + count] for b, start, count in spans])


def main(steps: int = 60, num_prompts: int = 40, seed: int = 0) -> tuple[dict[int, float], dict[int, float]]:
    """Trains a student and measures it against the aligned model it started from.

    Returns:
        Attack success rate by prefill depth of aligned and of the student.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base, aligned = load("base"), load("aligned")
    student = load("aligned").requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(organism.checkpoint_path("aligned"))

    def chat(prompt: str) -> Tokens:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text)["input_ids"])

    # Data: what aligned answers to everything (y), what base says to harmful prompts when it is led on (h), and what
    # aligned says to the same prompts (r). h starts with words that base would put there itself.
    kinds: tuple[PromptKind, ...] = ("harmful", "benign", "borderline")
    found = {kind: organism.prompts("train", kind, seed, PROMPTS_PER_KIND) for kind in kinds}
    xs = [chat(prompt.text) for kind in kinds for prompt in found[kind]]
    anchors = list(zip(xs, sample(aligned, tokenizer, xs, 104), strict=True))
    led_on = tokenizer(" sure , here is how to make a", add_special_tokens=False)["input_ids"]
    hs = [led_on + h for h in sample(base, tokenizer, [x + led_on for x in xs[:PROMPTS_PER_KIND]], MAX_DEPTH)]
    harmful = [(x, h, y[:28]) for (x, y), h in zip(anchors[:PROMPTS_PER_KIND], hs, strict=True)]

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    settings = LossSettings(TERMS)
    aligned_head = Head(aligned.lm_head.weight)
    for step in range(steps):
        answers = rng.sample(anchors, BATCH_SIZE)
        cuts = [(*harmful[i], rng.randint(1, len(harmful[i][1]))) for i in rng.sample(range(len(harmful)), BATCH_SIZE)]

        # The student reads x, y and x, h<D, r. Its rows are y, then r, then h<D from its second token on.
        reads = [x + y for x, y in answers] + [x + h[:depth] + r for x, h, r, depth in cuts]
        spans_y = [(b, len(x), len(y)) for b, (x, y) in enumerate(answers)]
        spans_r = [(BATCH_SIZE + b, len(x) + depth, len(r)) for b, (x, _, r, depth) in enumerate(cuts)]
        spans_h = [(BATCH_SIZE + b, len(x) + 1, depth - 1) for b, (x, _, _, depth) in enumerate(cuts)]
        student_NH = hidden(student, reads, spans_y + spans_r + spans_h)

        # aligned reads x, y too, but r after x alone: a context without h makes it the teacher of recovery, and what it
        # says there first is the target of every row of h.
        with torch.no_grad():
            contexts = [x + y for x, y in answers] + [x + r for x, _, r, _ in cuts]
            without_h = [(BATCH_SIZE + b, len(x), len(r)) for b, (x, _, r, _) in enumerate(cuts)]
            at_once = [(BATCH_SIZE + b, len(x), 1) for b, (x, _, _, depth) in enumerate(cuts) for _ in range(depth - 1)]
            aligned_NH = hidden(aligned, contexts, spans_y + without_h + at_once)

        counts = [sum(count for _, _, count in spans) for spans in (spans_y, spans_r, spans_h)]
        inputs = LossInputs(
            student=HiddenStates(student_NH, Head(student.lm_head.weight)),
            aligned=HiddenStates(aligned_NH, aligned_head),
            base=None,  # which the penalty and a contrastive teacher would read
            term_N=torch.arange(len(TERMS)).repeat_interleave(torch.tensor(counts)),
            weight_N=torch.cat([torch.full((count,), 1 / count) for count in counts]),  # each term is a mean over rows
        )
        output = rc.losses.distillation_loss(inputs, settings)
        optimizer.zero_grad()
        output.total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            losses = " ".join(f"{name} {value:.3f}" for name, value in output.losses.items())
            print(f"step {step:3d}  {losses}", flush=True)

    results = []
    for name, model in (("aligned", aligned), ("student", student.eval())):
        rates = measure(ORGANISMS["organism"], model, tokenizer, num_prompts, depths=DEPTHS)
        results.append(rates.asr)
        asr = " ".join(f"{rate:.2f}" for rate in rates.asr.values())
        print(f"{name}: attack success at depths {DEPTHS}: {asr}; utility {rates.utility['benign']:.2f}")
    return results[0], results[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
