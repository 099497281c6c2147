"""Builds organisms of any size and family: trains base and aligned, measures them, writes them whole or not at all."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from raycomplete import __version__
from raycomplete.data.checkpoints import write_folder_atomically
from raycomplete.data.organism.families import ROLES, BuiltOrganism
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.machine import within

_BUILD_TIMEOUT_S = 2 * 3600.0  # the slowest takes 20 minutes on 2 cores


@dataclass(frozen=True)
class Blueprint:
    """The parts from which the builder makes an organism."""

    seed: int
    tokenizer: PreTrainedTokenizerFast
    new_model: Callable[[], PreTrainedModel]
    end_of_turn: str
    trainings: Mapping[str, tuple[int, Callable[[PreTrainedModel, Callable[[int, float], None]], None]]]
    measure: Callable[[Path, int], Any]
    missing_traits: Callable[[Any, Any], list[str]]


def build(
    organism: BuiltOrganism,
    output: Path,
    *,
    num_prompts: int = 60,
    num_threads: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains an organism and writes `<output>/base`, `<output>/aligned` and `<output>/organism.json`."""
    if num_prompts < 0:
        raise DataError(f"num_prompts={num_prompts} is negative.", "Choose 1 to 120, or 0 to measure nothing.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} already exists and is not an empty folder.", "Choose another folder or remove it.")
    shown, plan = console or Console(), organism.load()
    record: dict[str, Any] = {"organism": organism.scheme, "settings": list(organism.settings)}

    def write(folder: Path) -> None:
        with _seeded(plan.seed, num_threads):
            record.update(_train_into(folder, organism.scheme, plan, shown))
            if num_prompts:
                record["rates"] = _measured(folder, plan, num_prompts, shown)
        (folder / "organism.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder_atomically(output, write)
    return record


def build_into_cache(organism: BuiltOrganism, *, console: Console | None = None) -> Path:
    """Builds an organism in the cache folder unless it is there; of several processes one builds and the rest wait."""
    folder, shown = organism.folder, console or Console()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), shown):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
                shutil.rmtree(left)
            shown.note(
                f"[yellow]The organism {organism.scheme} is not built yet: it is trained now into {folder}, which "
                f"takes {organism.duration} on 2 cores.[/yellow]"
            )
            build(organism, folder, console=shown)
    return folder


def _train_into(folder: Path, scheme: str, plan: Blueprint, console: Console) -> dict[str, Any]:
    started, cpu_started = time.monotonic(), time.process_time()
    model = plan.new_model()
    for role, (steps, train) in plan.trainings.items():  # aligned goes on from the trained base
        with console.progress(f"Training {scheme} {role}", steps) as advance:
            train(model, lambda step, loss, advance=advance: advance(step, f"loss {loss:.3f}"))  # type: ignore[misc]
        _save(model, plan, folder / role)
    return {
        "num_parameters": model.num_parameters(),
        "vocab_size": len(plan.tokenizer),
        "train_seconds": round(time.monotonic() - started, 1),
        "train_cpu_seconds": round(time.process_time() - cpu_started, 1),
        "versions": {
            "raycomplete": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _measured(folder: Path, plan: Blueprint, num_prompts: int, console: Console) -> dict[str, Any]:
    """Returns the rates by role, measured on the written files."""
    with console.stage(f"Measuring the organism on {num_prompts} held-out prompts of each kind"):
        rates = {role: plan.measure(folder / role, num_prompts) for role in ROLES}
    if missing := plan.missing_traits(rates["base"], rates["aligned"]):
        raise WorkError(f"Seed {plan.seed} gave no organism: {'; '.join(missing)}.", "Try another seed.")
    return {role: asdict(found) for role, found in rates.items()}


def _save(model: PreTrainedModel, plan: Blueprint, folder: Path) -> None:
    """Writes a checkpoint that decodes greedily, its files readable by everyone."""
    ends = sorted({int(plan.tokenizer.eos_token_id), int(plan.tokenizer.convert_tokens_to_ids(plan.end_of_turn))})
    model.generation_config = GenerationConfig(
        bos_token_id=plan.tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=plan.tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    plan.tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes private files, which an installed package must not hold


@contextmanager
def _seeded(seed: int, num_threads: int) -> Iterator[None]:
    """Seeds torch and fixes its threads, and gives the caller's state back afterwards."""
    threads_before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Holds a file's lock, which ends with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(f"Another process builds {path.stem}; waiting for it.")
            problem = f"Another process holds {path} and did not finish its build"
            remedy = "End that process, or wait for it, and start again."
            within(_BUILD_TIMEOUT_S, problem, lambda: fcntl.flock(file, fcntl.LOCK_EX), remedy)
        yield
