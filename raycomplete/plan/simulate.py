"""The training loop played event by event, with queues, jitter and weights that age.

Built apart from the closed form of `step`, so that each checks the other: the trainer follows
`raycomplete.training.source`, engines serve their queues in order, and every batch is split over the replicas of a
role, whose slowest one is waited for.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from raycomplete.plan.step import Loop, Pace


@dataclass(frozen=True)
class Simulated:
    """What a simulation saw after its warm-up.

    Attributes:
        pace: Mean seconds a step, and the share of them in which the trainer waits for rollouts or scores.
        staleness: Largest number of steps by which the weights of trained rollouts lagged behind.
        steps: Counted steps.
    """

    pace: Pace
    staleness: int
    steps: int


def simulate(
    loop: Loop,
    *,
    steps: int = 400,
    warmup: int = 50,
    jitter: float = 0.0,
    seed: int = 0,
    replicas: Mapping[str, int] | None = None,
) -> Simulated:
    """Plays the loop.

    Args:
        loop: Mean durations, with all replicas of a role at work.
        steps: Counted steps.
        warmup: Steps before them.
        jitter: Standard deviation of each duration over its mean (log-normal, mean kept).
        seed: Of the jitter.
        replicas: Engines by role ("rollout", "aligned", "base"), 1 where absent.
    """
    last = warmup + steps
    # A few more steps follow, so that the last counted ones still have later steps scored beside them.
    world = _World(loop, random.Random(seed), jitter, replicas or {}, last + loop.lookahead + 1)
    world.run()
    span = world.started[last] - world.started[warmup]
    busy = sum(world.busy[warmup:last])
    return Simulated(Pace(span / steps, 1 - busy / span), max(world.staleness[warmup:last], default=0), steps)


class _Queue:
    """Engines of one role behind one queue: a job is split over all of them and is over when the slowest part is."""

    def __init__(self, world: _World, count: int) -> None:
        self._world, self._count = world, count
        self._waiting: deque[tuple[float, bool, Callable[[], None]]] = deque()
        self._busy = False

    def put(self, seconds: float, then: Callable[[], None], *, jitter: bool = True) -> None:
        """Queues a job of `seconds` when it is split evenly."""
        self._waiting.append((seconds, jitter, then))
        if not self._busy:
            self._start()

    def _start(self) -> None:
        self._busy = True
        seconds, jitter, then = self._waiting.popleft()
        slowest = max(self._world.noisy(seconds) for _ in range(self._count)) if jitter else seconds
        self._world.after(slowest, lambda: self._finish(then))

    def _finish(self, then: Callable[[], None]) -> None:
        self._busy = False
        then()
        if self._waiting and not self._busy:
            self._start()


class _World:
    """Clock, events, queues and the trainer's state."""

    def __init__(self, loop: Loop, rng: random.Random, jitter: float, replicas: Mapping[str, int], steps: int) -> None:
        self.loop, self._rng, self._steps = loop, rng, steps
        self._sigma = math.sqrt(math.log1p(jitter**2))
        self._now, self._count = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        everyone = _Queue(self, 1)
        names = [*loop.scoring, *(["rollout"] if loop.rollout is not None else [])]
        self._queues = {name: everyone if loop.shared else _Queue(self, replicas.get(name, 1)) for name in names}
        self._trainer = everyone if loop.shared else _Queue(self, 1)
        self._rolled: set[int] = set()
        self._asked: set[int] = set()
        self._missing: dict[int, int] = {}  # frozen models that have not scored a step yet
        self._wanted: Callable[[], bool] | None = None
        self._resume: Callable[[], None] | None = None
        self._version = 0
        self._version_of: dict[int, int] = {}
        self.started: list[float] = []
        self.busy: list[float] = []  # seconds of training and updates by step
        self.staleness: list[int] = []

    def run(self) -> None:
        """Until the last step is trained."""
        self._begin(0)
        while self._events:
            self._now, _, action = heapq.heappop(self._events)
            action()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Schedules an action; equal times keep their order."""
        self._count += 1
        heapq.heappush(self._events, (self._now + seconds, self._count, action))

    def noisy(self, seconds: float) -> float:
        """A duration with its jitter."""
        if self._sigma == 0:
            return seconds
        return seconds * math.exp(self._rng.gauss(-(self._sigma**2) / 2, self._sigma))

    def _wait(self, ready: Callable[[], bool], then: Callable[[], None]) -> None:
        """The trainer goes on as soon as something is there."""
        if ready():
            then()
        else:
            self._wanted, self._resume = ready, then

    def _something_arrived(self) -> None:
        if self._wanted is not None and self._resume is not None and self._wanted():
            then, self._wanted, self._resume = self._resume, None, None
            then()

    def _begin(self, step: int) -> None:
        self.started.append(self._now)
        self.busy.append(0.0)
        if self.loop.rollout is None:
            for ahead in range(step, min(step + 1 + self.loop.lookahead, self._steps)):
                if ahead not in self._asked:
                    self._asked.add(ahead)
                    self._score(ahead)
            self._wait(lambda: self._missing.get(step) == 0, lambda: self._train(step))
        elif step in self._asked:
            self._wait(lambda: step in self._rolled, lambda: self._sync(step))
        else:
            self._sync(step)

    def _sync(self, step: int) -> None:
        if step % self.loop.sync_every:
            self._ask_rollouts(step)
            return

        def done() -> None:
            self._version = step
            self._ask_rollouts(step)

        # Engines load weights one after another with what they do, and the trainer waits for them.
        seconds = self.noisy(self.loop.sync)
        self.busy[step] += seconds
        self._queues["rollout"].put(seconds, done, jitter=False)

    def _ask_rollouts(self, step: int) -> None:
        for ahead in range(step, min(step + self.loop.lookahead + 1, self._steps)):
            if ahead not in self._asked:
                self._asked.add(ahead)
                self._version_of[ahead] = self._version
                assert self.loop.rollout is not None
                self._queues["rollout"].put(self.loop.rollout, partial(self._rollouts_done, ahead))
        self._wait(lambda: self._missing.get(step) == 0, lambda: self._train(step))

    def _rollouts_done(self, step: int) -> None:
        self._rolled.add(step)
        self._score(step)
        self._something_arrived()

    def _score(self, step: int) -> None:
        wanted = {role: seconds for role, seconds in self.loop.scoring.items() if seconds > 0}
        self._missing[step] = len(wanted)
        for role, seconds in wanted.items():
            self._queues[role].put(seconds, lambda: self._scored(step))

    def _scored(self, step: int) -> None:
        self._missing[step] -= 1
        self._something_arrived()

    def _train(self, step: int) -> None:
        if self.loop.rollout is not None:
            self.staleness.append(step - self._version_of[step])
        fetch, train = self.noisy(self.loop.fetch), self.noisy(self.loop.train)
        self.busy[step] += train
        self._trainer.put(fetch + train, lambda: self._end(step), jitter=False)

    def _end(self, step: int) -> None:
        if step + 1 < self._steps:
            self._begin(step + 1)
