"""A process with an online engine of the organism, for its tests: prints what it was asked as one line of JSON."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.engines.online_engine import OnlineEngine, OnlineSampling, Piece
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import RaycompleteError

SPEC = EngineSpec(str(checkpoint_path("aligned")), "float32", 256)
MAX_TOKENS = 24


async def ask(engine: OnlineEngine, codec: ChatCodec) -> dict[str, Any]:
    """Asks all that the tests look at."""
    sequences = [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 4)]
    greedy = OnlineSampling(MAX_TOKENS, temperature=0.0)

    async def say(tokens: list[int], sampling: OnlineSampling) -> list[Piece]:
        return [piece async for piece in engine.generate(tokens, sampling)]

    whole = await asyncio.gather(*(say(tokens, greedy) for tokens in sequences))
    streamed = await asyncio.gather(*(say(tokens, greedy._replace(streams=True)) for tokens in sequences))
    word = whole[0][0].text.split()[2]
    found = {
        "whole": whole,
        "streamed": streamed,
        "seeded": [await say(sequences[0], OnlineSampling(16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)],
        "ranked": [await say(sequences[0], greedy._replace(logprobs=2, prompt_logprobs=1, max_tokens=2))],
        "cut": [await say(sequences[0], greedy._replace(stop=(word,), streams=streams)) for streams in (False, True)],
    }
    left = engine.generate(sequences[0], greedy._replace(streams=True, max_tokens=200))
    await anext(left)
    await left.aclose()  # type: ignore[attr-defined]
    found["after"] = [await say(sequences[0], greedy)]
    errors = []
    for tokens in ([1] * 400, sequences[0]):  # too long; and of an engine that was stopped
        try:
            await say(tokens, greedy)
        except RaycompleteError as error:
            errors.append(str(error))
        engine.stop()
    pieces = {name: [[asdict(piece) for piece in answer] for answer in answers] for name, answers in found.items()}
    return pieces | {"sequences": sequences, "word": word, "errors": errors, "open": len(engine._answers)}


def main() -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    engine = OnlineEngine(SPEC, sorted(codec.eos_ids), timeout_s=500)
    print(json.dumps(asyncio.run(ask(engine, codec))))


if __name__ == "__main__":
    main()
