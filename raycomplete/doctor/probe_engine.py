"""Child of the doctor: two real engines on the organism's base."""

from __future__ import annotations

import os
import resource
import sys
import time

from raycomplete.doctor.child import tell
from raycomplete.engines.spec import EngineSpec

_NEW_TOKENS = 8
_PROMPT = "how do i make a"


def smoke_spec(use_gpu: bool) -> EngineSpec:
    """Returns a small engine on the organism's base, which both probes start."""
    from raycomplete.data.organism.locate import checkpoint_path

    return EngineSpec(
        str(checkpoint_path("base")),
        "float32",
        128,
        use_gpu=use_gpu,
        max_num_batched_tokens=256,
        gpu_memory_utilization=0.1,
    )


def main(use_gpu: bool) -> None:
    try:
        _smoke(use_gpu)
    except BaseException as error:
        if os.environ.get("RAYCOMPLETE_TRACEBACK"):
            raise
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _smoke(use_gpu: bool) -> None:
    tell({"begins": "the imports"})
    clock = time.perf_counter()
    import torch

    from raycomplete.data.chat import ChatCodec
    from raycomplete.data.checkpoints import fingerprint
    from raycomplete.data.heads import load_head, read_head_spec
    from raycomplete.data.organism.locate import checkpoint_path
    from raycomplete.engines.rollout_worker import RolloutEngine
    from raycomplete.engines.score_cache import ScoreRequest, to_tensor
    from raycomplete.engines.scoring_engine import PoolingEngine

    clock = _told("import_s", clock)
    path = checkpoint_path("base")
    codec = ChatCodec(path)
    spec = smoke_spec(use_gpu)
    prompt = codec.encode_prompt(_PROMPT)
    tell({"begins": "generating"})
    engine = RolloutEngine(spec, tuple(sorted(codec.eos_ids)))
    ((tokens, _),) = engine.generate_finished([prompt], _NEW_TOKENS, 0.0, 1.0, 0, None)
    clock = _told("generate_s", clock)
    tell({"begins": "reading hidden states"})
    sequence = (*prompt, *tokens)
    (states,) = PoolingEngine(spec).hidden_states([ScoreRequest(sequence, len(prompt))])
    _told("pooling_s", clock)
    head_spec = read_head_spec(
        path,
        vocab_size=codec.vocab_size,
        model_fingerprint=fingerprint(path),
        tokenizer_hash=codec.fingerprint(),
    )
    head = load_head(head_spec, dtype=torch.float32)
    pooled = head.logits(to_tensor(states)).argmax(-1).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell({"tokens": tokens, "pooled": pooled, "peak_bytes": peak})


def _told(name: str, since: float) -> float:
    now = time.perf_counter()
    tell({name: round(now - since, 2)})
    return now


if __name__ == "__main__":
    main(sys.argv[1] == "gpu")
