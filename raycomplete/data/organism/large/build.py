"""Builds the large organism: trains base and aligned, measures them, and writes them whole or not at all."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from raycomplete import __version__
from raycomplete.data.checkpoints import write_folder_atomically
from raycomplete.data.organism.build import save, seeded
from raycomplete.data.organism.large import DEFAULT_FAMILY, SCHEME, BuildPlan, folder_of, model_values
from raycomplete.data.organism.large.measure import measure, missing_traits
from raycomplete.data.organism.large.training import (
    aligned_examples,
    base_examples,
    build_tokenizer,
    new_model,
    train,
)
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError, WorkError

_NOTES = 10  # lines about the progress of a training, where there is no terminal to draw a bar on


def build(
    output: Path,
    *,
    family: str = DEFAULT_FAMILY,
    seed: int = 0,
    plan: BuildPlan | None = None,
    num_prompts: int = 60,
    num_threads: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains an organism and writes `<output>/base`, `<output>/aligned` and `<output>/organism.json`.

    `output` is whole or absent at any time. The same seed, plan, threads, versions and machine give the same bytes.

    Args:
        output: Folder to create; it must not exist, or be empty.
        family: A key of `FAMILIES`.
        seed: Seeds weights and training data; tokenizer and split are always the same.
        num_prompts: Held-out prompts of each kind on which the result is measured; 0 measures nothing.
        num_threads: Torch threads. It stays fixed by default because sums in another order change the weights.

    Returns:
        The content of `organism.json`: family, seed, plan, versions, seconds, and what was measured.

    Raises:
        CheckpointError: The organism is not built in this family.
        DataError: `output` exists and is not an empty folder, or `num_prompts` is negative.
        WorkError: The trained models lack the traits of the organism.
    """
    model_values(family)
    if num_prompts < 0:
        raise DataError(f"num_prompts={num_prompts} is negative.", "Choose 1 to 120, or 0 to measure nothing.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} already exists and is not an empty folder.", "Choose another folder or remove it.")
    record: dict[str, Any] = {"family": family, "seed": seed, "plan": asdict(plan or BuildPlan())}
    shown = console or Console()

    def write(folder: Path) -> None:
        with seeded(seed, num_threads):
            record.update(_train_into(folder, family, seed, plan or BuildPlan(), shown))
        if num_prompts:
            with shown.stage(f"Measuring the organism on {num_prompts} held-out prompts of each kind"):
                rates = {role: measure(folder / role, num_prompts, seed) for role in ("base", "aligned")}
            if missing := missing_traits(rates["base"], rates["aligned"]):
                raise WorkError(f"Seed {seed} gave no organism: {'; '.join(missing)}.", "Try another seed.")
            record["rates"] = {role: asdict(found) for role, found in rates.items()}
        (folder / "organism.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder_atomically(output, write)
    return record


def build_into_cache(
    family: str = DEFAULT_FAMILY, seed: int = 0, *, plan: BuildPlan | None = None, console: Console | None = None
) -> Path:
    """Builds an organism in the cache folder unless it is there; of several processes one builds and the rest wait.

    Returns:
        The folder of the build.
    """
    folder, shown = folder_of(family, seed, plan), console or Console()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
                shutil.rmtree(left)
            shown.note(
                f"[yellow]The organism {SCHEME} ({family}) is not built yet: it is trained now into {folder}, which "
                "takes 10 to 20 minutes on 2 cores.[/yellow]"
            )
            build(folder, family=family, seed=seed, plan=plan, console=shown)
    return folder


def _train_into(folder: Path, family: str, seed: int, plan: BuildPlan, console: Console) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    started, cpu_started = time.monotonic(), time.process_time()
    model = new_model(family, tokenizer)
    stages = (
        ("base", base_examples(random.Random(f"{seed} base")), plan.base),
        ("aligned", aligned_examples(random.Random(f"{seed} aligned")), plan.aligned),
    )
    for role, examples, training in stages:  # aligned goes on from the trained base
        with _followed(console, f"Training {SCHEME} {role}", training.steps) as on_step:
            train(model, tokenizer, examples, training, on_step)
        save(model, tokenizer, folder / role)
    return {
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "train_seconds": round(time.monotonic() - started, 1),
        "train_cpu_seconds": round(time.process_time() - cpu_started, 1),
        "versions": {
            "raycomplete": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


@contextmanager
def _followed(console: Console, title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Shows the steps of a training by a bar, or by a few lines where the output is no terminal."""
    with console.progress(title, steps) as advance:

        def on_step(step: int, loss: float) -> None:
            remark = f"loss {loss:.3f}"
            advance(step, remark)
            if not console.rich.is_terminal and step % max(1, steps // _NOTES) == 0:
                console.note(f"{title}: step {step} of {steps}, {remark}")

        yield on_step


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, which ends with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
