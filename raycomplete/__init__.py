"""raycomplete finishes the safety alignment of a language model, on Ray, from a laptop to a cluster.

It measures where safety training stopped, trains the rest in, and shows the result under attack:

    import raycomplete as rc

    run = rc.load_run_file("jobs/organism.yaml", ["train.steps=60"])
    folder = rc.train(run)

`align`, `evaluate`, `diagnose` and `serve` take a run file in the same way; each is the command of its name. The loss
and the attacks can be used by themselves, as `rc.losses` and `rc.attacks`. Importing raycomplete loads none of this:
every name is imported at its first use.

The subpackages, from lower to upper, in groups. One may import from its own group and from those above it in this list:

    runtime     errors, shared types, files, logs, console, signals, calls of Ray actors, plugins

    config      the typed run file
    data        prompts, chat templates, model families, checkpoints, samples, the organism
    attacks     related attacks in one file: settings, code, registration
    methods     one file a training method: settings, rows, teacher contexts, loss terms
    losses      the table of loss terms, the chunked pass, the float64 reference, kernels

    engines     vLLM: scorers, rollout engines, weight sync; the `Run` that commands pass on
    training    samples to steps to batches, on-policy rollouts, the worker
    evaluation  the runner, judges, benchmarks, statistics, results
    diagnosis   everything that measures where alignment stopped
    plan        memory, speed and cost of a run, on paper
    report      report.html and its figures
    storage     the mirror of run folders

    serving     evaluations over HTTP
    doctor      the examination of a machine

    commands    one file a command, wiring only; `cli.py` gives them their options and exit codes
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycomplete import attacks, losses, methods
    from raycomplete.commands.align import align
    from raycomplete.commands.diagnose import diagnose
    from raycomplete.commands.evaluate import evaluate
    from raycomplete.commands.serve import serve
    from raycomplete.commands.train import train
    from raycomplete.config import load_run_file

__version__ = "0.2.0"
__all__ = ["align", "attacks", "diagnose", "evaluate", "load_run_file", "losses", "methods", "serve", "train"]

_COMMANDS = frozenset({"align", "diagnose", "evaluate", "serve", "train"})


def __getattr__(name: str) -> Any:
    """Imports a name of the Python API at its first use."""
    if name in _COMMANDS:
        from raycomplete.runtime.machine import let_idle_threads_sleep

        let_idle_threads_sleep()  # commands load torch, which reads it once
        return getattr(import_module(f"{__name__}.commands.{name}"), name)
    if name == "load_run_file":
        return import_module(f"{__name__}.config").load_run_file
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
