"""`raycomplete align`: safety SFT, which makes an aligned twin of a base model in the usual shallow way.

Refusals come from the user's file; harmless prompts are answered by base itself, so that nothing but refusing is
learned. The result is what most safety-tuned models are: firm at the first tokens and unchanged deeper in.
"""

from __future__ import annotations

from pathlib import Path

from raycomplete.commands.stored import stored
from raycomplete.commands.train import make_job, run_training
from raycomplete.config import RunConfig
from raycomplete.data.checkpoints import check_trainable
from raycomplete.data.inputs import prepare_alignment_prompts, prepare_models
from raycomplete.data.samples import AnchorSample, SampleSet, read_samples, write_samples
from raycomplete.engines.cluster import plan_run
from raycomplete.engines.generation_cache import SAMPLING_FILE, sampled_from
from raycomplete.engines.run import OutputFolder, Run, open_run
from raycomplete.methods.sft import SFT
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, DataError
from raycomplete.runtime.files import write_json
from raycomplete.training.sampling import first_seed

_DONE = "aligned.json"
_SAME = ("models", "data", "rollout", "train", "align")  # sections that decide what is trained


@stored("-align")
def align(config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Trains the aligned checkpoint that the run file names as `models.aligned`."""
    console = console or Console()
    config.models.refuse_thinking()
    settings = config.align
    output = Path(config.models.aligned).resolve()
    if not settings.refusals or not settings.benign:
        raise ConfigError("align.refusals and align.benign are needed for safety SFT.", "Name prompt files there.")
    if settings.batch_size % config.train.num_workers:
        raise ConfigError(
            f"align.batch_size ({settings.batch_size}) must be a multiple of train.num_workers "
            f"({config.train.num_workers})."
        )
    config = config.model_copy(update={"output": config.output.renamed("-align")})
    # After a killed `--overwrite`, what lies there is still the old one.
    if (output / "config.json").is_file() and not overwrite and not _is_unfinished(config.output.folder):
        console.note(f"The aligned checkpoint is there already: {output}")
        return output
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(config, roles=("base",))
        check_trainable(models.paths["base"])
        prompts = prepare_alignment_prompts(config)
    without = next((prompt for prompt in prompts.train["harmful"] if not prompt.answer), None)
    if without is not None:
        raise DataError(f"The prompt {without.prompt_id} of align.refusals has no answer.", "Name its answer column.")
    folder = OutputFolder(config, same=_SAME, resume=resume, overwrite=overwrite)
    plan = plan_run(config, workers=config.train.num_workers)
    with open_run(folder, models, prompts, plan, console) as run:
        samples_file = run.folder / "samples.jsonl"
        if not samples_file.is_file():
            with run.start_engines():
                write_samples(samples_file, _samples(run))
        (run.folder / SAMPLING_FILE).unlink(missing_ok=True)
        _train(run, output)
        write_json(run.folder / _DONE, {"aligned": str(output)})
    console.note(f"Aligned checkpoint: {output}")
    return output


def _is_unfinished(folder: Path) -> bool:
    """Tells whether an alignment was begun in a folder, or begun anew, and has not written its checkpoint."""
    return (folder / "config.yaml").is_file() and not (folder / _DONE).is_file()


def _samples(run: Run) -> SampleSet:
    """Makes the samples: refusals and base's own harmless answers in the wanted share, no longer than the context."""
    config, codec = run.config, run.models.codec
    refusals, benign = run.prompts.train["harmful"], run.prompts.train["benign"]
    settings = config.align
    benign_per_refusal = settings.benign_fraction / max(1 - settings.benign_fraction, 1e-9)
    num_benign = round(len(refusals) * benign_per_refusal)
    limit, context = settings.max_answer_tokens, config.models.max_length
    learned, cut = [], 0
    for prompt in refusals:
        answer = (*codec.encode_answer(prompt.answer or ""), codec.eos_id)
        cut += len(answer) > limit
        # An answer that is cut ends without end-of-response: the model must not learn to stop in mid-sentence.
        learned.append(AnchorSample(prompt.prompt_id, tuple(prompt.encoded(codec)), answer[:limit]))
    prompt_ids = [prompt.encoded(codec) for prompt in benign[:num_benign]]
    fitting = [(p, ids) for p, ids in zip(benign, prompt_ids, strict=False) if len(ids) + limit < context]
    title = f"Answers of base to {len(fitting)} harmless prompts"
    with sampled_from(run, run.models.paths["base"], title, len(fitting)) as base:
        answers = base.generate_finished(
            [ids for _, ids in fitting],
            max_tokens=limit,
            temperature=config.rollout.temperature,
            seed=first_seed(config, "align"),
        )
    kept = [
        AnchorSample(prompt.prompt_id, tuple(ids), (*tokens, *((codec.eos_id,) if finished else ())))
        for (prompt, ids), (tokens, finished) in zip(fitting, answers, strict=True)
        if tokens
    ]
    samples = [sample for sample in (*learned, *kept) if len(sample.prompt_ids) + len(sample.answer_ids) <= context]
    dropped = len(learned) + len(kept) - len(samples)
    run.console.note(
        f"{len(learned)} refusals ({cut} cut at {limit} tokens), {len(kept)} harmless answers of {num_benign} wanted; "
        f"{dropped} samples left out as longer than the context"
    )
    return SampleSet(tuple(samples))


def _train(run: Run, output: Path) -> None:
    config = run.config
    settings = config.align
    off = config.train.validation.model_copy(update={"every": 0})  # there is no aligned model yet to compare with
    changed = {"steps": settings.steps, "lr": settings.lr, "lora_rank": 0, "validation": off}
    train = config.train.model_copy(update=changed)
    method = SFT(anchor_batch_size=settings.batch_size)
    job = make_job(run, "base", output, method=method, train=train)
    count = len(read_samples(job.samples).anchor)
    run_training(run, job, f"Safety SFT on {count} samples")
