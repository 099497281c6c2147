"""The training loop of one Ray Train worker, top to bottom.

Each step: take its sequences and scores, forward and backward over micro-batches, one optimizer step, share the
measurements, feed them back to the depth sampler, write the metrics row; now and then measure held-back prompts, which
steer loss weights and choose the step that is kept, and write a checkpoint. The method says what is trained
(`raycomplete.methods`).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray import train as ray_train

from raycomplete.config.engines import OVERSAMPLE
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES, adapted_modules, load_model, save_checkpoint
from raycomplete.data.heads import load_head
from raycomplete.data.samples import read_samples
from raycomplete.diagnosis.rows import DiagnosisSettings
from raycomplete.losses.loss import LossOutput
from raycomplete.methods.registry import DepthConfig
from raycomplete.runtime.files import write_json
from raycomplete.runtime.logs import set_step
from raycomplete.runtime.machine import named_when_full
from raycomplete.runtime.metrics_file import MetricsFile, finite, open_sinks
from raycomplete.runtime.plugins import load_plugins
from raycomplete.runtime.prometheus import begin, finished_step
from raycomplete.training import checkpoints
from raycomplete.training.batches import BatchBuilder, cut_harmful, teacher_contexts
from raycomplete.training.deepspeed_engine import BadSteps, gathered_state, spread_bad_loss, start_engine
from raycomplete.training.job import TrainJob
from raycomplete.training.metrics import StepMeter, describe_terms, peak_memory_gib, release_freed_memory
from raycomplete.training.on_policy import OnPolicySource
from raycomplete.training.step_plan import DepthSampler, Planner, StepSequences
from raycomplete.training.student import StudentModule, keeps_sequences_apart, widening_size
from raycomplete.training.teacher_prefetcher import StepSource, TeacherPrefetcher
from raycomplete.training.validation import Steering, Validator, position_profile

logger = logging.getLogger(__name__)


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Trains on one worker; `config` is {"job": TrainJob}."""
    load_plugins(config["job"].plugins)
    worker = Worker(config["job"])
    stopped_after = worker.train()
    if stopped_after is None:
        worker.finish()
    return {"stopped_after": stopped_after}


class Worker:
    """One rank of a training run."""

    def __init__(self, job: TrainJob) -> None:
        if not job.use_gpu:
            torch.set_num_threads(job.threads)
        self.job = job
        self.rank = ray_train.get_context().get_world_rank()
        self.world_size = ray_train.get_context().get_world_size()
        begin("training worker", self.rank)
        torch.manual_seed(job.train.seed)

        samples, train, method = read_samples(job.samples), job.train, job.method
        self.samples = replace(
            samples,
            anchor=method.trained(samples.anchor),
            recovery=cut_harmful(samples.recovery, job.max_harmful_tokens),
            held_back_recovery=cut_harmful(samples.held_back_recovery, job.max_harmful_tokens),
        )
        planner = self._make_planner()
        self.sampler = DepthSampler(self._reachable_depths(), train.seed)
        step = StepSequences.of(planner.plan(0, self.sampler), method)
        items = [*step.anchor, *step.recovery]
        per_rank = sum(map(len, items)) // self.world_size
        self.per_device_batch_size = min(train.per_device_batch_size, per_rank)
        self.accumulation = min(-(-per_rank // self.per_device_batch_size), len(items) // self.world_size)
        self.loss = method.loss()
        self.terms = describe_terms(self.loss)
        self.builder = BatchBuilder(self.loss, scale=float(self.world_size * self.accumulation))
        prefetcher = TeacherPrefetcher(job.scorers, partial(teacher_contexts, self.builder, method))
        self.steering = Steering(train.validation, self.loss.weights)
        self.interval = train.validation.interval(train.steps)
        self.bad_steps = BadSteps(job.folder)
        self.stop = False
        self.lm, self.engine = self._start_engine()
        packed = keeps_sequences_apart(self.engine, self.samples.anchor[0], job.dtype)
        self.builder = replace(self.builder, packed=packed, hidden_size=widening_size(self.lm.config))
        shared = (prefetcher, self.sampler, self.rank, self.world_size)
        if job.student_engines is None:
            self.source = StepSource(job, planner, *shared)
        else:
            job.student_engines.attach(self.engine, self.lm, train, self.samples.anchor, packed=packed)
            self.source = OnPolicySource(job, self._make_planner(OVERSAMPLE), *shared)
        self.validator: Validator | None = None
        if self.interval and job.response_judge is not None and self.samples.held_back_recovery:
            self.validator = Validator(self.engine, self.samples, job, self.per_device_batch_size, packed=packed)
        self.recorded_best = 0  # step of the best one that the newest checkpoint knows of
        self.first_step = self._restore()
        first = self.rank == 0
        self.metrics = MetricsFile(job.metrics_file, keep_steps=self.first_step) if first else None
        self.sinks = open_sinks(train.sinks, job.folder) if first else []

    def _make_planner(self, oversample: int = 1) -> Planner:
        method = self.job.method
        return Planner(
            self.samples,
            anchor_batch_size=method.anchor_batch_size,
            recovery_batch_size=method.recovery_batch_size * oversample,
            seed=self.job.train.seed,
            borderline_fraction=method.borderline_fraction,
        )

    def _reachable_depths(self) -> DepthConfig:
        """The run file's depths, cut at the longest h: a bin that no sample reaches would be drawn forever."""
        depth = self.job.method.depth
        reached = (len(sample.harmful_ids) - sample.refusal_prefix_tokens for sample in self.samples.recovery)
        longest = max(reached, default=depth.max)
        return depth.model_copy(update={"max": max(min(depth.max, longest), depth.min)})

    def _start_engine(self) -> tuple[Any, Any]:
        job, train = self.job, self.job.train
        lm = inner = load_model(job.start, job.dtype, trust_remote_code=job.trust_remote_code)
        lm.train()
        if train.gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        if rank := train.lora_rank:
            from peft import LoraConfig, get_peft_model

            lm = get_peft_model(lm, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=adapted_modules(lm)))
            inner = lm.get_base_model()
        device = torch.device("cuda", torch.cuda.current_device()) if job.use_gpu else torch.device("cpu")
        teachers = {
            role: load_head(spec, dtype=TORCH_DTYPES[job.dtype], device=device)
            for role, spec in job.teacher_heads.items()
        }
        module = StudentModule(
            inner,
            job.student_head,
            teachers,
            self.loss,
            external_head=train.zero_stage == 3,
            student_pass=job.method.student_pass(inner),
        )
        return lm, start_engine(module, train, job.dtype, self.per_device_batch_size, self.accumulation)

    def _restore(self) -> int:
        """Restores the newest checkpoint and returns the number of finished steps."""
        state = checkpoints.restore(self.engine, self.job.checkpoints)
        if state is None:
            return 0
        self.sampler.load_state_dict(state["sampler"])
        self.source.load_state_dict(state["source"])
        self.bad_steps.load_state_dict(state["bad_steps"])
        if self.validator is not None:
            self.steering.load_state_dict(state["steering"])
            best_step = self.steering.best_step
            if best_step and not checkpoints.is_whole(self.job.best_checkpoint, best_step):
                logger.warning("The best checkpoint, of step %d, is lost or damaged.", best_step)
                self.steering.forget_best()
            self._record_best()  # what was best on a way that is not gone again must not be shipped
        return int(state["step"])

    def _record_best(self) -> None:
        self.recorded_best = self.steering.best_step
        checkpoints.keep_only(self.job.best_checkpoint, self.recorded_best)

    def train(self) -> int | None:
        """Runs the steps that are left, or fewer where held-back prompts say that nothing gets better."""
        train, done, stops = self.job.train, self.first_step, False
        for step in range(self.first_step, train.steps):
            if self.steering.is_over:
                break
            row = self._step(step)
            done = step + 1
            if self.validator is not None and (done % self.interval == 0 or done == train.steps):
                row |= self._validate(self.validator, done)
            if self.metrics is not None:
                self.metrics.append(row)
                finished_step(row, self.terms)
            for sink in self.sinks:
                sink.write(finite(row))
            stops = self.stop and done < train.steps and self.source.can_stop(done)
            if done % train.checkpoint_every == 0 or done == train.steps or stops or self.steering.is_over:
                parts = ("sampler", "source", "bad_steps", "steering")
                state = {name: getattr(self, name).state_dict() for name in parts}
                checkpoints.save(self.engine, self.job.checkpoints, done, state, train)
                if self.validator is not None:
                    self._record_best()
            if stops:
                break
        for sink in self.sinks:
            sink.close()
        if stops:
            return done
        if self.validator is not None:
            self._keep_best(done)
        self._profile()
        return None

    def _validate(self, validator: Validator, done: int) -> dict[str, Any]:
        started = time.perf_counter()
        row = self.steering.update(validator.measure(done))
        release_freed_memory()
        if self.steering.best_step == done:
            # A kill from here on goes back to the last checkpoint, and so to the best one that it names.
            checkpoints.keep_only(self.job.best_checkpoint, self.recorded_best)
            checkpoints.save_weights(self.lm, self.job.best_checkpoint, done, self.job.train)
        seconds = time.perf_counter() - started
        return {"validation": row, "validation_s": seconds, "stopped": self.steering.is_over}

    def _keep_best(self, done: int) -> None:
        """Goes back to the best step, or stays at the last one where it is lost, and notes which one is kept."""
        step = self.steering.best_step
        if step:
            checkpoints.restore_weights(self.lm, self.job.best_checkpoint, step, self.job.train)
        if self.rank == 0:
            write_json(self.job.kept_step_file, {"step": step or done, "why": self.steering.describe_choice()})

    def _profile(self) -> None:
        """Writes the position profile of the aligned model and of the trained student, on held-out prompts."""
        job = self.job
        if not self.samples.profile or not job.scorers:
            return
        size, packed = self.per_device_batch_size, self.builder.packed
        profile = position_profile(self.engine, self.samples.profile, job.scorers, size, packed=packed)
        if profile and self.rank == 0:
            measured, positions = DiagnosisSettings.of_loss(self.loss), list(range(len(profile["student"]["n"])))
            settings = {"positions": positions, "tau": measured.tau, "kappa": measured.kappa}
            write_json(job.folder / "profile.json", settings | profile)

    def finish(self) -> None:
        """Writes the student as a Hugging Face checkpoint."""
        if self.job.train.lora_rank > 0:
            self.lm = self.lm.merge_and_unload()
        state = gathered_state(self.lm, self.job.train.zero_stage)
        if state is not None:
            for unfinished in self.job.output.parent.glob(f".{self.job.output.name}.*"):  # of an export that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            codec = ChatCodec(self.job.start, trust_remote_code=self.job.trust_remote_code)
            # A tied head is the embedding under a second name; save_pretrained drops the repeat by itself.
            with named_when_full(self.job.output.parent, "the student"):
                save_checkpoint(self.job.output, self.lm, codec, state)
        dist.barrier()
        ray_train.report({"step": self.job.train.steps})

    def _step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        set_step(step + 1)
        # Dropout, where a model has it, then draws the same after a resume.
        torch.manual_seed(hash((self.job.train.seed, step, self.rank)))
        job, given = self.job, self.source.next(step)
        learning_rate = float(self.engine.get_lr()[0])  # the optimizer step moves the schedule on
        schedule, measured = job.method.schedule((step + 1) / job.train.steps), self.steering.factors
        factors = {name: schedule.get(name, 1.0) * measured.get(name, 1.0) for name in {**schedule, **measured}}
        sequences = StepSequences.of(given.plan, job.method)
        meter = StepMeter(self.loss, self.sampler, job.method.depth_term)
        computed = needed = 0
        skipped_before = self.engine.skipped_steps
        self.bad_steps.begin()
        for chunk in sequences.micro_batches(self.rank, self.world_size, self.accumulation):
            batch = self.builder.build(chunk, sequences.normalisers, given.scores, factors)
            computed, needed = computed + batch.input_ids_BT.numel(), needed + batch.num_tokens
            batch = batch.to(self.engine.device)
            output = LossOutput.unflatten(self.engine(batch, "loss"), self.loss)
            meter.add(batch, output)
            self.bad_steps.watch(batch, output.total, output.row_loss_N)
            self.engine.backward(spread_bad_loss(output.total))
            self.engine.step()
        meter.stop = self.rank == 0 and job.stop_file.name in os.listdir(job.folder)  # fresh on NFS, too
        row = meter.share(self.engine.device, self.builder.scale, factors)
        self.stop = meter.stop
        is_bad = self.engine.skipped_steps > skipped_before
        self.bad_steps.count(step, skipped=is_bad)
        if not is_bad:  # what a bad step measured would spoil the running means
            by_rollouts = given.compliance if job.method.depth.measure == "compliance" else None
            self.sampler.update(*(by_rollouts or (meter.depth_loss_sum, meter.depth_count)))
        seconds = time.perf_counter() - started
        grad_norm = self.engine.get_global_grad_norm()
        row |= {"bad_steps": self.bad_steps.total, "padding_fraction": 1 - needed / computed}
        row |= {f"{name}_weight": factor * self.loss.weights[name] for name, factor in factors.items()}
        row |= {"lr": learning_rate} | given.stats
        row |= {
            "step": step + 1,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "seconds": seconds,
            "tokens": sequences.num_tokens,
            "tokens_per_s": sequences.num_tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self.engine.device),
        }
        if given.plan.recovery:
            row |= {
                "depth_mean": float(np.mean([item.answer_depth for item in given.plan.recovery])),
                "depth_probabilities": [float(value) for value in self.sampler.probabilities()],
                "depth_bins": [[low, high] for low, high in self.sampler.bin_ranges],
            }
        return row
