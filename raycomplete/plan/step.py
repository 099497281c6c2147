"""How long a step takes when its parts overlap: the closed form.

A step is a loop of events with precedence only (max and plus), so without jitter its steady pace is the largest mean
weight of a cycle of that loop. The cycles are few and are written out in `step_s`; `simulate` plays the same loop
event by event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

IN_TURN = "rollouts, scoring and training in turn"


@dataclass(frozen=True)
class Loop:
    """Durations of one step's parts, in seconds, on the devices that each role has.

    Attributes:
        train: The optimizer step itself.
        scoring: Of each frozen model.
        rollout: Sampling; None off-policy, where samples are there before training.
        sync: One update of the rollout engines' weights.
        fetch: Hidden states on their way to the trainer, which waits for them.
        lookahead: Off-policy: steps scored ahead. On-policy: batches rolled out ahead, 0 or 1.
        sync_every: Steps between two updates.
        shared: All roles take turns on the same devices, so nothing overlaps for nothing.
    """

    train: float
    scoring: Mapping[str, float]
    rollout: float | None = None
    sync: float = 0.0
    fetch: float = 0.0
    lookahead: int = 1
    sync_every: int = 1
    shared: bool = False


@dataclass(frozen=True)
class Pace:
    """A steady state.

    Attributes:
        step: Seconds from step to step.
        waiting: Share of them in which the trainer waits for rollouts or scores; updates of weights are no waiting.
        cycles: Mean weight of each cycle of the loop, by the name of what it goes through; the largest is the step.
    """

    step: float
    waiting: float
    cycles: dict[str, float] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str:
        """Name of the longest cycle; of those within rounding, the first."""
        longest = max(self.cycles.values())
        return next(name for name, seconds in self.cycles.items() if seconds >= longest * (1 - 1e-9))


def cycles(loop: Loop) -> dict[str, float]:
    """Every cycle that may set the pace, in seconds a step."""
    slowest = max(loop.scoring.values(), default=0.0)
    trainer = loop.fetch + loop.train
    sync = loop.sync / loop.sync_every if loop.rollout is not None else 0.0
    rollout = loop.rollout or 0.0
    if loop.shared:
        return {"everything in turn": trainer + sync + rollout + sum(loop.scoring.values())}
    found = {f"{role} scorer": seconds for role, seconds in loop.scoring.items() if seconds > 0}
    if loop.rollout is None:
        found["trainer"] = trainer
        ahead = loop.lookahead + 1
        found["scoring and training in turn"] = (slowest + trainer) / ahead
        return found
    if loop.lookahead == 0:
        return {IN_TURN: sync + rollout + slowest + trainer}
    found["trainer"] = trainer + sync
    found["rollout engines"] = rollout + sync
    found[IN_TURN] = _in_turn(loop, rollout, slowest, trainer)
    return found


def _in_turn(loop: Loop, rollout: float, slowest: float, trainer: float) -> float:
    """The longest cycle through rollouts of one step, scoring and training of a later one.

    From the start of step i a walk may go on to step i + 1 by training or sampling, or to step i + k by sampling, k - 1
    batches of scoring and training; it pays for the update of the step that it arrives at, where one is due. With an
    update in every step this is (rollout + scoring + training + sync) / 2, if scoring alone is not slower.
    """
    every = loop.sync_every
    edges = [(1, max(trainer, rollout))]
    edges += [(ahead, rollout + (ahead - 1) * slowest + trainer) for ahead in range(2, every + 2)]
    best = 0.0
    for start in range(every):
        longest = {start: 0.0}
        for step in range(start, start + every * (every + 1)):
            if step in longest:
                for ahead, weight in edges:
                    target = step + ahead
                    value = longest[step] + weight + (loop.sync if target % every == 0 else 0.0)
                    longest[target] = max(longest.get(target, 0.0), value)
            if step > start and (step - start) % every == 0:
                best = max(best, longest[step] / (step - start))
        last = start + every * (every + 1)
        best = max(best, longest[last] / (last - start))
    return best


def pace(loop: Loop) -> Pace:
    """The steady state of a loop without jitter."""
    found = cycles(loop)
    step = max(found.values())
    busy = loop.train + (loop.sync / loop.sync_every if loop.rollout is not None else 0.0)
    return Pace(step, 1 - busy / step if step > 0 else 0.0, found)
