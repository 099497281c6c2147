"""Cost of an evaluation before it starts, and its speed and the time left from what was measured so far."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from raycomplete.attacks.trial import Progress, TrialCost
from raycomplete.runtime.console import duration


class EvaluationPace:
    """Follows the evaluations of several models, one after another; speeds measured on one serve for the next.

    Nothing is estimated before something like it was measured: each attack by its own trials, and attacks that only
    generate by the tokens of others.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)  # at work, by attack
        self._made: Counter[str] = Counter()  # trials in that time
        self._generated_s = self._generated = 0.0  # seconds and most tokens of attacks that only generate
        self.start({}, {})

    def start(self, costs: Mapping[str, TrialCost], stored: Mapping[str, int]) -> None:
        """Begins with another model: `costs` of the trials to be made by attack, `stored` those that are there."""
        self._costs, self._stored = costs, stored
        self._done: Counter[str] = Counter()
        self._last, self._last_done = self._clock(), 0

    def update(self, progress: Progress) -> str:
        """Takes in what was finished since the last call; says how far the attack is, how fast, and what is left."""
        now, name = self._clock(), progress.attack
        if name not in self._costs:
            self._last = now
            return ""
        before = max(self._done[name] - self._stored[name], 0)
        self._done[name] += progress.done - self._last_done
        made = max(self._done[name] - self._stored[name], 0) - before
        if made:  # stored trials come first, and at no cost
            self._seconds[name] += now - self._last
            self._made[name] += made
            cost = self._costs[name]
            if not cost.passes and not cost.gradients:
                self._generated_s += now - self._last
                self._generated += cost.tokens * made / cost.trials
        self._last, self._last_done = now, progress.done
        return self._text(name)

    def _text(self, name: str) -> str:
        of = self._costs[name].trials + self._stored[name]
        text = f"{name} {self._done[name]}/{of}"
        if self._seconds[name]:
            text += f", {self._made[name] / self._seconds[name]:.2g}/s"
        left = self.seconds_left(name)
        return text if left is None or self._done[name] == of else f"{text}, {duration(left)} left"

    def seconds_left(self, name: str) -> float | None:
        """Estimates the time that an attack still takes; None where nothing like it was measured."""
        cost = self._costs[name]
        left = cost.trials - max(self._done[name] - self._stored[name], 0)
        if self._made[name]:
            return left * self._seconds[name] / self._made[name]
        if not left or (self._generated and not cost.passes and not cost.gradients):
            return left and left / cost.trials * cost.tokens * self._generated_s / self._generated
        return None

    def summary(self) -> str:
        """Says what is left of this model, and what is not in the sum since nothing like it was measured."""
        left = {name: self.seconds_left(name) for name in self._costs}
        unknown = [name for name, seconds in left.items() if seconds is None]
        known = duration(sum(seconds for seconds in left.values() if seconds is not None))
        return f"about {known} left" + (f", and {', '.join(unknown)}, not measured yet" if unknown else "")

    def table(self) -> list[list[str]]:
        """Makes the rows of a table of costs, the header first; times stand where something was measured."""
        times = {name: self.seconds_left(name) for name in self._costs}
        timed = any(times.values())
        rows = [["", "trials", "tokens", "passes", "gradients", *(["time"] if timed else [])]]
        for name, cost in self._costs.items():
            numbers = [_short(cost.trials), _short(cost.tokens), _short(cost.passes), _short(cost.gradients)]
            seconds = times[name]
            rows.append([name, *numbers, *(["-" if seconds is None else duration(seconds)] if timed else [])])
        return rows


def _short(number: int) -> str:
    """Formats a count in at most five characters."""
    if not number:
        return "-"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(number)
