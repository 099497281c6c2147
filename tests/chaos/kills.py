"""Kills scorers, rollout engines, training workers, drivers and whole nodes in the middle of on-policy runs.

    python -m tests.chaos.kills --out FOLDER [--rounds 3] [--seed 0]

Two nodes, one undisturbed run, then `rounds` runs in each of which every kind of victim is killed once (SIGKILL), in
random order at random steps. Each must recover by itself; only a dead driver is submitted again, by the same command.
kills.json holds what happened, and the process ends with 1 where a step was lost or a result differs.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.chaos.cluster import LocalCluster, WatchedRun
from tests.chaos.driver import TITLES, kill, of_role, options

STEPS, CHECKPOINT_EVERY = 30, 5
VICTIMS = (*TITLES, "driver", "node")
SETTINGS = (
    "rollout.on_policy=true",
    "data.limit_per_kind=48",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "train.num_workers=2",
    "train.zero_stage=2",
    "method.anchor_batch_size=12",
    "method.recovery_batch_size=12",
    "train.per_device_batch_size=12",
    "train.max_failures=10",
    "cluster.placement=spread",
    "evaluation.num_prompts=24",
    "evaluation.depths=[0,16]",
)
_WORKER_NODE = "127.0.0.3"
_TIMEOUT_S = 600.0


@dataclass
class Kill:
    """One death, the last finished step and checkpoint then, and the steps and seconds until a new step came."""

    round: int
    victim: str
    processes: int
    step: int
    checkpoint: int
    redone: int = 0
    seconds: float = 0.0

    @property
    def kept_its_checkpoint(self) -> bool:
        """Tells whether nothing before the last checkpoint was done again."""
        return self.redone <= self.step - self.checkpoint


def strike(cluster: LocalCluster, victim: str, rng: random.Random) -> int:
    """Kills one victim and returns the number of processes that died."""
    if victim == "node":
        return cluster.kill_node(_WORKER_NODE)
    found = of_role(victim, cluster.roots())
    if not found:
        raise LookupError(f"No process of a {victim} runs.")
    return kill([rng.choice(found)])


def one_round(run: WatchedRun, number: int, rng: random.Random, console: Console) -> list[Kill]:
    """A run in which everything dies once."""
    run.submit()
    victims = rng.sample(VICTIMS, len(VICTIMS))
    moments = sorted(rng.sample(range(2, STEPS - 2), len(VICTIMS)))
    kills = []
    for victim, moment in zip(victims, moments, strict=True):
        run.wait_until(lambda moment=moment: run.last_step() >= moment, what=f"step {moment}", timeout_s=_TIMEOUT_S)
        time.sleep(rng.random())  # anywhere within a step
        checkpoint = run.last_checkpoint()
        death = Kill(number, victim, strike(run.cluster, victim, rng), run.last_step(), checkpoint)
        watch_recovery(run, death)
        console.print(f"round {number}: {victim} at step {death.step}, {death.redone} redone, {death.seconds:.0f} s")
        kills.append(death)
        if victim == "node":
            run.cluster.add_worker(_WORKER_NODE)
    run.finish(_TIMEOUT_S)
    return kills


def watch_recovery(run: WatchedRun, death: Kill) -> None:
    """Waits for a step that is new, and notes how many were made again before it.

    The processes of a dead driver may finish a step before they go too, so that after its death only steps of the next
    submission count; such a last step counts as finished all the same.
    """
    submissions = run.submissions + (death.victim == "driver")
    lowest = death.step

    def recovered() -> bool:
        nonlocal lowest
        last = run.last_step()
        lowest = min(lowest, last)
        if run.submissions < submissions:
            death.step = max(death.step, last)
            return False
        return last > death.step

    what = f"a step after {death.step} and the death of the {death.victim}"
    death.seconds = run.wait_until(recovered, what=what, timeout_s=_TIMEOUT_S)
    death.redone = death.step - lowest


def compare(run: WatchedRun, calm: WatchedRun) -> dict[str, Any]:
    """Losses and rates of a disturbed run beside those of the undisturbed one."""
    mine, theirs = ([row["loss"] for row in item.metrics()] for item in (run, calm))
    asr, calm_asr = (item.summary()["asr"]["student"]["mean"]["rate"] for item in (run, calm))
    return {
        "steps": len(mine),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
        "last_loss": mine[-1],
        "calm_last_loss": theirs[-1],
        "asr": asr,
        "calm_asr": calm_asr,
    }


def run(out: Path, *, rounds: int, seed: int, console: Console) -> bool:
    """Does all of it and writes the results; returns whether nothing was lost."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rng = random.Random(seed)
    kills: list[Kill] = []
    results: dict[str, dict[str, Any]] = {}
    with LocalCluster() as cluster:
        calm = WatchedRun(cluster, out, "undisturbed", SETTINGS)
        calm.submit()
        calm.finish(2 * _TIMEOUT_S)
        console.print("undisturbed run: done")
        for number in range(1, rounds + 1):
            disturbed = WatchedRun(cluster, out, f"round-{number}", SETTINGS)
            kills += one_round(disturbed, number, rng, console)
            results[disturbed.name] = compare(disturbed, calm) | {"submissions": disturbed.submissions}
            console.print(f"{disturbed.name}: {results[disturbed.name]}")
            content = {"kills": [asdict(death) for death in kills], "runs": results}
            write_text(out / "kills.json", json.dumps(content, indent=1) + "\n")
    return all(death.kept_its_checkpoint for death in kills) and all(r["steps"] == STEPS for r in results.values())


if __name__ == "__main__":
    given = options("kills", rounds=3, seed=0).parse_args()
    sys.exit(0 if run(given.out, rounds=given.rounds, seed=given.seed, console=Console(width=150)) else 1)
