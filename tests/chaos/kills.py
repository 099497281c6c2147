"""Kills scorers, rollout engines, training workers, drivers and whole nodes in the middle of on-policy runs.

    python -m tests.chaos.kills --out FOLDER [--rounds 3] [--seed 0]

Two nodes, one undisturbed run, then `rounds` runs in each of which every kind of victim is killed once (SIGKILL), in
random order at random steps. Each must recover by itself; only a dead driver is submitted again, by the same command.
kills.md and kills.json hold what happened, and the process ends with 1 where a step was lost or a result differs.
"""

from __future__ import annotations

import argparse
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
from tests.benchmarks.environment import RUNS
from tests.benchmarks.tables import Table
from tests.chaos.cluster import LocalCluster
from tests.chaos.processes import TITLES, kill, of_role
from tests.chaos.runs import WatchedRun

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
    """One death and what came after it.

    Attributes:
        victim: What was killed.
        processes: How many processes that were.
        step: Last finished step when it was killed.
        checkpoint: Step of the newest complete checkpoint then.
        redone: Finished steps that were done again.
        seconds: From the kill to the first step beyond `step`.
    """

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
        raise LookupError(f"No process of a {victim} runs on {', '.join(cluster.node_names)}.")
    return kill([rng.choice(found)])


def one_round(cluster: LocalCluster, number: int, rng: random.Random, out: Path, console: Console) -> list[Kill]:
    """A run in which everything dies once."""
    run = WatchedRun(cluster, out, f"round-{number}", SETTINGS)
    run.submit()
    victims = rng.sample(VICTIMS, len(VICTIMS))
    moments = sorted(rng.sample(range(2, STEPS - 2), len(VICTIMS)))
    kills = []
    for victim, moment in zip(victims, moments, strict=True):
        run.wait_until(lambda moment=moment: run.last_step() >= moment, what=f"step {moment}", timeout_s=_TIMEOUT_S)
        time.sleep(rng.random())  # anywhere within a step
        checkpoint = run.last_checkpoint()
        death = Kill(number, victim, strike(cluster, victim, rng), run.last_step(), checkpoint)
        watch_recovery(run, death)
        console.print(f"round {number}: {victim} at step {death.step}, {death.redone} redone, {death.seconds:.0f} s")
        kills.append(death)
        if victim == "node":
            cluster.add_worker(_WORKER_NODE)
    run.finish(_TIMEOUT_S)
    return kills


def watch_recovery(run: WatchedRun, death: Kill) -> None:
    """Waits for a step that is new, and notes how many were made again before it.

    What a driver leaves behind may finish a step before it goes too, so that after its death only steps of the next
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
    """How a disturbed run's result differs from the undisturbed one's."""
    mine, theirs = run.losses(), calm.losses()
    rates = [item.summary()["asr"]["student"]["mean"]["rate"] for item in (run, calm)]
    return {
        "steps": len(mine),
        "submissions": run.submissions,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
        "last_loss": mine[-1],
        "calm_last_loss": theirs[-1],
        "asr": rates[0],
        "calm_asr": rates[1],
    }


def run(out: Path, *, rounds: int, seed: int, console: Console) -> bool:
    """Does all of it and writes the results; returns whether nothing was lost."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rng = random.Random(seed)
    with LocalCluster() as cluster:
        calm = WatchedRun(cluster, out, "undisturbed", SETTINGS)
        calm.submit()
        calm.finish(2 * _TIMEOUT_S)
        console.print("undisturbed run: done")
        kills: list[Kill] = []
        results: dict[str, dict[str, Any]] = {}
        for number in range(1, rounds + 1):
            kills += one_round(cluster, number, rng, out, console)
            disturbed = WatchedRun(cluster, out, f"round-{number}", SETTINGS)
            results[disturbed.name] = compare(disturbed, calm)
            _write(out, kills, results, console if number == rounds else None)
    return all(death.kept_its_checkpoint for death in kills) and all(
        result["steps"] == STEPS for result in results.values()
    )


def _write(out: Path, kills: list[Kill], results: dict[str, dict[str, Any]], console: Console | None) -> None:
    tables = [
        Table(
            f"Deaths (SIGKILL) in on-policy runs of {STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}, two nodes",
            ("round", "victim", "processes", "at step", "checkpoint", "steps redone", "seconds to the next new step"),
            [
                (
                    str(k.round),
                    k.victim,
                    str(k.processes),
                    str(k.step),
                    str(k.checkpoint),
                    str(k.redone),
                    f"{k.seconds:.0f}",
                )
                for k in kills
            ],
        ),
        Table(
            "Against the undisturbed run",
            ("run", "steps", "largest difference of a step's loss", "last loss", "attack success"),
            [
                (
                    name,
                    str(r["steps"]),
                    f"{r['largest_loss_difference']:.2g}",
                    f"{r['last_loss']:.5f} ({r['calm_last_loss']:.5f})",
                    f"{r['asr']:.3f} ({r['calm_asr']:.3f})",
                )
                for name, r in results.items()
            ],
        ),
    ]
    content = {"kills": [asdict(death) for death in kills], "runs": results}
    write_text(out / "kills.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "kills.md", "\n".join(table.to_markdown() for table in tables))
    for table in tables if console is not None else ():
        table.show(console)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills")
    parser.add_argument("--out", type=Path, default=RUNS.parent / "chaos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    passed = run(arguments.out.resolve(), rounds=arguments.rounds, seed=arguments.seed, console=Console(width=150))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
