"""What a check finds, and what checks are given."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from raycomplete.config import RunConfig
from raycomplete.runtime.errors import RaycompleteError

Status: TypeAlias = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")  # from good to bad


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: "warn" is worth knowing and stops nothing; "fail" stops a run, now or later.
        found: What was measured, in words.
        remedy: What to do about it; never empty where the status is not "ok".
        values: The same as numbers and names, for programs.
    """

    status: Status
    found: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def ok(found: str, **values: Any) -> Finding:
    """Nothing to do."""
    return Finding("ok", found, values=values)


def warn(found: str, remedy: str, **values: Any) -> Finding:
    """Worth knowing; a run may still work."""
    return Finding("warn", found, remedy, values)


def fail(found: str, remedy: str, **values: Any) -> Finding:
    """A run would be refused, or die."""
    return Finding("fail", found, remedy, values)


def worst(statuses: Sequence[Status]) -> Status:
    """The worst of several; "ok" of none."""
    return max(statuses, key=STATUSES.index, default="ok")


class Context:
    """What every check may look at.

    Args:
        run_file: The run file that the machine is examined for, if any.
        config: The same, loaded; None where there is none or it cannot be loaded.
        overrides: Values that replaced those of the run file.
        problem: Why the run file cannot be loaded.
        quick: Leave out what takes long.
    """

    def __init__(
        self,
        run_file: Path | None = None,
        config: RunConfig | None = None,
        overrides: Sequence[str] = (),
        problem: RaycompleteError | None = None,
        *,
        quick: bool = False,
    ) -> None:
        self.run_file, self.config, self.overrides, self.problem = run_file, config, tuple(overrides), problem
        self.quick = quick
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str | None:
        """The cluster that a run would join; None where it starts one on this machine."""
        address = self.config.cluster.address if self.config else None
        address = address or os.environ.get("RAY_ADDRESS")
        return None if address == "local" else address

    def once(self, name: str, ask: Callable[[], Any]) -> Any:
        """The answer of a slow question that several checks share; asked by the first of them."""
        with self._lock:
            if name not in self._known:
                self._known[name] = ask()
            return self._known[name]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Unique, in words; stable, since programs read it.
        run: The check itself.
        timeout_s: After which it has failed.
    """

    name: str
    run: Callable[[Context], Finding]
    timeout_s: float = 20.0
