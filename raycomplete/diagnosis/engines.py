"""The engines of a diagnosis: one generator, scorers of base and aligned, and one of the student where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import load_head
from raycomplete.data.inputs import Models
from raycomplete.diagnosis.partitions import Walk
from raycomplete.diagnosis.samples import Sample
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.start import Engines, start_engines
from raycomplete.losses.heads import Head
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import ModelRole, Prompt

_PARITY_TOKENS = 48
_REFUSAL_RATIO = 2.0
# Parameters of glibc's mallopt (malloc.h): how much free memory the process keeps, how much more it asks for at a time,
# and from which size on a block is handed back on its own.
_MALLOPT = {-1: 2**30, -2: 2**26, -3: 2**25}


def make_room_for_engines(num_engines: int) -> None:
    """Readies this process for a walk on a CPU beside engines that keep one core busy each.

    It takes the threads that they leave, at least one, and keeps the memory that it frees, since the walk makes and
    drops blocks of megabytes. Processor time a token, SmolLM2-135M's head on 2 idle cores: 0.87 ms before, 0.80 with
    the memory kept, 0.77 with one thread as well.

    Args:
        num_engines: Engines at work while this process walks.
    """
    torch.set_num_threads(max(1, available_cpus() - num_engines))
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: slower, nothing else
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


@contextmanager
def start_diagnosis_engines(
    config: RunConfig, cluster: Cluster, models: Models, console: Console, prompts: Sequence[Prompt]
) -> Iterator[Engines]:
    """As `raycomplete.engines.start.start_engines`, the student scored where there is one; scores are not kept: every response is read once."""
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache_gib": 0.0})})
    parity = []
    for prompt in prompts[: config.teacher.parity_prompts]:
        prompt_ids = models.codec.encode_prompt(prompt.text)
        answer_ids = models.codec.encode_answer(prompt.answer or prompt.text)[:_PARITY_TOKENS]
        parity.append(((*prompt_ids, *answer_ids)[: config.models.max_length], len(prompt_ids)))
    scored: tuple[ModelRole, ...] = ("aligned", "base")
    if "student" in models.paths:
        scored = (*scored, "student")
    with start_engines(config, cluster, models, console, parity_sequences=parity, scored=scored) as engines:
        yield engines


def make_walk(engines: Engines, models: Models, config: RunConfig, refusal_ids: Sequence[int]) -> Walk:
    """The walk over the engines's scorers, with heads in the models' own dtype.

    Heads in float32 would cost three times as much on a CPU and change next to nothing: on SmolLM2-135M the mass went
    from 0.209 to 0.215 and the KL from 0.0347 to 0.0352 nats with heads in bf16 (float32 throughout: 0.206, 0.0342).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        make_room_for_engines(len(engines.scorers))
    heads: dict[str, Head] = {
        role: load_head(models.heads[role], dtype=TORCH_DTYPES[config.models.dtype], device=device)
        for role in ("base", "aligned", "student")
        if role in models.paths
    }
    return Walk(dict(engines.scorers), heads, tuple(refusal_ids), config.diagnose)


def find_refusal_tokens(walk: Walk, codec: ChatCodec, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens that start a refusal, most frequent first.

    Given texts (`diagnose.refusal_starts`) give their first tokens. Otherwise: the aligned model's likeliest first
    tokens on harmful prompts, where it finds them at least twice as likely as base does. The definition is ours.
    """
    if walk.settings.refusal_starts:
        return list(dict.fromkeys(codec.encode_answer(text)[0] for text in walk.settings.refusal_starts))
    # Any token may stand in for the response: only the state before it is asked for.
    samples = [Sample(prompt.prompt_id, tuple(codec.encode_prompt(prompt.text)), (0,)) for prompt in prompts]
    found: dict[int, int] = {}
    for _, hidden in walk.hidden_states(samples):
        log_aligned_NV, log_base_NV = (
            walk.heads[role].logits(hidden[role]).log_softmax(dim=-1) for role in ("aligned", "base")
        )
        likeliest_N1 = log_aligned_NV.argmax(dim=-1, keepdim=True)
        ratio_N = (log_aligned_NV - log_base_NV).gather(1, likeliest_N1)[:, 0].exp()
        for token in likeliest_N1[ratio_N >= _REFUSAL_RATIO, 0].tolist():
            found[token] = found.get(token, 0) + 1
    return sorted(found, key=lambda token: (-found[token], token))
