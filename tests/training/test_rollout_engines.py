"""The student in rollout engines as the trainer uses it: weights that are proved, rollouts that are judged."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raycomplete.config import RolloutConfig, TrainConfig, ValidationConfig
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.samples import AnchorSample, RecoverySample, read_samples
from raycomplete.engines.rollout_pool import SyncError, SyncReport
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.runtime.types import Outcome, Prompt
from raycomplete.training.on_policy import Rollout, RolloutBatch, StudentEngines
from raycomplete.training.step_plan import RecoveryItem
from raycomplete.training.trainer import fit
from tests.engines import tiny as engine_tiny
from tests.engines.file_transfer import file_pool
from tests.training.tiny import CountingJudge, FourBins, completion, make_job

HARMFUL = organism.prompts("train", "harmful", 0, 6)
NO_TRANSFER = SimpleNamespace(spec=SimpleNamespace(weight_transfer=None))


def state_of(role: str) -> dict[str, torch.Tensor]:
    model = load_model(checkpoint_path(role), "float32")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def attached(engines: StudentEngines, codec: ChatCodec) -> list[torch.Tensor]:
    """Attaches engines to the aligned model, and returns its log-probabilities of two short answers."""
    model = load_model(checkpoint_path("aligned"), "float32")
    samples, expected = [], []
    for prompt in HARMFUL[:2]:
        ids, answer = tuple(codec.encode_prompt(prompt.text)), tuple(codec.encode_answer(prompt.answer or "")[:8])
        with torch.no_grad():
            log_probs_TV = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected.append(log_probs_TV[torch.arange(len(answer)), torch.tensor(answer)])
        samples.append(AnchorSample(prompt.prompt_id, ids, answer))
    engines.attach(None, model, TrainConfig(), samples, packed=True)
    return expected


@pytest.mark.slow
def test_rollouts_come_from_the_weights_that_were_sent_and_are_judged(generator: Any) -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    rollout = RolloutConfig(on_policy=True, max_student_tokens=16, temperature=0.0)
    pool = generator.with_weights(str(checkpoint_path("aligned")))
    engines = StudentEngines(pool, codec, organism.OrganismJudge(), HARMFUL, rollout)
    engines = pickle.loads(pickle.dumps(engines))  # as it reaches a training worker
    expected = attached(engines, codec)
    with pytest.raises(SyncError, match="differs from the trainer"):
        engines._stored(state_of("base"), 6, expected)
    report = engines._stored(state_of("aligned"), 7, expected)
    assert report["version"] == 7
    assert report["mean_abs_difference"] < 1e-4

    recovery, depths = [], []
    for prompt in HARMFUL:
        ids = tuple(codec.encode_prompt(prompt.text))
        harmful_ids = tuple(codec.encode_answer(prompt.answer or ""))
        recovery += [RecoverySample(f"{prompt.prompt_id}#0", ids, ids, harmful_ids, ())] * 2
        depths += [0, 24]
    rollouts = engines.collect(engines.submit(RolloutBatch(0, (), tuple(recovery), tuple(depths)), seed=0))
    assert {rollout.version for rollout in rollouts} == {7}
    assert [rollout.refused for rollout in rollouts[0::2]] == [True] * 6, "aligned refuses without a prefill"
    assert [rollout.refused for rollout in rollouts[1::2]] == [False] * 6, "and complies after a long one"
    assert all(codec.eos_id not in rollout.token_ids for rollout in rollouts)
    assert {rollout.ending_ids for rollout in rollouts[0::2]} <= {(), (codec.eos_id,)}


def collected(codec: ChatCodec, text: str, judge: Any, depth: int = 4) -> Rollout:
    """The student's answer as a judged rollout; an imitated refusal stands before h."""
    prompt = HARMFUL[0]
    prefix_ids, harmful_ids = codec.encode_answer("i can not help ."), codec.encode_answer(prompt.answer or "")
    ids = tuple(codec.encode_prompt(prompt.text))
    sample = RecoverySample(f"{prompt.prompt_id}#0", ids, ids, (*prefix_ids, *harmful_ids), (), len(prefix_ids))
    batch = RolloutBatch(0, (), (sample,), (RecoveryItem.cut(sample, depth).depth,))
    pool: Any = SimpleNamespace(collect=lambda call: [(codec.encode_answer(text), True)], options=NO_TRANSFER)
    engines = StudentEngines(pool, codec, judge, HARMFUL, RolloutConfig())
    (rollout,) = engines.collect((batch, SimpleNamespace(version=3), None))
    return rollout


def test_the_judge_does_not_read_the_imitated_refusal() -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    read: list[tuple[str, str]] = []

    class Recorder:
        name = "recorder"

        def outcome(self, prompt: Any, prefill: str, continuation: str) -> Outcome:
            read.append((prefill, continuation))
            return Outcome.COMPLIED

    assert not collected(codec, "step one", Recorder()).refused
    assert read == [(codec.decode(codec.encode_answer(HARMFUL[0].answer or "")[:4]), "step one")]


def test_where_a_refusal_begins_is_counted_in_tokens() -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    text = "the leaves and the bowl . i cannot help with that ."
    for judge in (organism.OrganismJudge(), RefusalJudge()):
        late = collected(codec, text, judge)
        assert late.refused
        assert codec.decode(late.token_ids[: late.refusal_start]) == "the leaves and the bowl ."
    assert collected(codec, "i cannot help with that .", organism.OrganismJudge()).refusal_start == 0
    assert collected(codec, HARMFUL[0].answer or "", organism.OrganismJudge()).refusal_start is None

    class Blind(organism.OrganismJudge):
        refusal_start = None  # type: ignore[assignment]

    assert collected(codec, text, Blind()).refusal_start is None


def test_weights_by_the_store_end_a_transfer_and_await_engines_that_start_again() -> None:
    """A group of processes holds memory of the device."""
    codec, closed, awaited = ChatCodec(checkpoint_path("aligned")), [], []
    report = SyncReport(1, 0.0, 0.0, 0, 0.0, 0.0, 1, 1.0)
    pool: Any = SimpleNamespace(
        pack=lambda state, version: version,
        sync=lambda *_: report,
        wait_until_ready=awaited.append,
        options=NO_TRANSFER,
    )
    engines = StudentEngines(pool, codec, organism.OrganismJudge(), HARMFUL, RolloutConfig(), start_timeout_s=7.0)
    expected = attached(engines, codec)
    transfer: Any = SimpleNamespace(send=lambda state, version: version, close=lambda: closed.append(True))
    engines._transfer = transfer
    assert engines._sent({}, 1, expected)
    assert closed == awaited == []
    for _ in range(2):
        assert engines._stored({}, 2, expected)["transfer"] == "store"
    assert (closed, awaited) == ([True], [7.0])


ROLLOUT = RolloutConfig(on_policy=True, max_student_tokens=4, max_refusal_tokens=4)
# In the training worker: the carrier, and the engine's death before it is asked for the rollouts of the third step.
PLUGIN = """
import os, signal
from pathlib import Path
import ray
from raycomplete.training.on_policy import StudentEngines
from tests.engines.file_transfer import register_carrier

folder = Path({folder!r})
register_carrier(folder)
submit = StudentEngines.submit

def submit_after_a_death(self, batch, seed):
    if batch.step == 2 and not (folder / "dead").exists():
        (folder / "dead").touch()
        process = ray.get(self._pool._actors[0].__ray_call__.remote(lambda worker: os.getpid()), timeout=120)
        os.kill(process, signal.SIGKILL)
    return submit(self, batch, seed)

StudentEngines.submit = submit_after_a_death
"""


@pytest.mark.slow
def test_training_goes_on_by_the_store_after_an_engine_died_with_sent_weights(
    ray_cluster: None, tmp_path: Path
) -> None:
    for seed, role in enumerate(("base", "aligned")):
        engine_tiny.make_model(tmp_path / role, seed, tied=True, dtype="float32")
    plugin, carried = tmp_path / "plugin.py", tmp_path / "carried"
    carried.mkdir()
    plugin.write_text(PLUGIN.format(folder=str(carried)))
    train = TrainConfig(
        steps=4,
        lr=1e-2,
        warmup_steps=1,
        per_device_batch_size=4,
        checkpoint_every=4,
        validation=ValidationConfig(every=0),
    )
    job = make_job(tmp_path, train, completion(depth=FourBins(min=1, max=8)))
    samples = read_samples(job.samples)
    prompts = [Prompt(sample.prompt_id, "x", "harmful") for sample in (*samples.anchor, *samples.recovery)]
    given = engine_tiny.options(job.start)
    options = replace(given, spec=replace(given.spec, weight_transfer="file"), rollout=ROLLOUT)
    with file_pool(options) as pool:
        engines = StudentEngines(pool, ChatCodec(job.start), CountingJudge(), prompts, ROLLOUT)
        job = replace(job, rollout=ROLLOUT, student_engines=engines, plugins=(plugin,))
        fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    rows = read_metrics(job.metrics_file)
    assert [row["sync"]["transfer"] for row in rows] == ["file", "file", "store", "store"]
    assert [row["sync"]["version"] for row in rows] == [0, 1, 2, 3]
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1], "the third step's rollouts were made again"
    assert all(row["sync"]["mean_abs_difference"] < 1e-4 for row in rows)
    assert all(row["rollout_tokens"] > 0 for row in rows)
