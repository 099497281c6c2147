"""One evaluation of the service, in a process of its own: started by `serve`, spoken to through its pipes.

The first line of standard input says what to do, a later one may say to cancel, and its end says that the runner is
gone: then this process ends at once, since the next runner takes over from what is on disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycomplete.config import parse
from raycomplete.runtime.errors import RaycompleteError, RefusedError, WaitTimeoutError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.machine import let_idle_threads_sleep

_LOCK_TIMEOUT_S = 60.0


def main() -> None:
    """Evaluates, and says how far it is and how it ended."""
    let_idle_threads_sleep()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with what is said

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    asked = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_obey, args=(cancelled,), daemon=True).start()
    try:
        config = parse(asked["config"], "The request", plugins=True)  # made from the server's own run file
        with only_writer(config.output.folder):
            from raycomplete.commands.evaluate import evaluate  # torch, after what can be refused without it

            evaluate(
                config,
                roles=asked["roles"],
                on_progress=lambda progress: say(progress=progress.to_json()),
                cancelled=cancelled.is_set,
            )
    except RaycompleteError as error:
        say(error=[error.problem, error.remedy], refused=isinstance(error, RefusedError))
    else:
        say(done=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds an evaluation's folder; the kernel lets go of it however this process ends.

    Raises:
        WaitTimeoutError: A process of an earlier attempt still writes there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, PRIVATE)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"Another process still writes into {folder} after {_LOCK_TIMEOUT_S:.0f} s.", "End it first."
                    ) from error
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _obey(cancelled: threading.Event) -> None:
    for line in sys.stdin:
        if json.loads(line).get("cancel"):
            cancelled.set()
    os._exit(3)


if __name__ == "__main__":
    main()
