"""`raycomplete` and `python -m raycomplete`: from the first moment a signal ends the command in a sentence."""

from __future__ import annotations

import os
import signal
from typing import Any


def _leave(*_: Any) -> None:
    os.write(2, b"Stopped before anything was started; the same command starts it.\n")
    os._exit(1)


def main() -> None:
    """Runs the command line, whose modules take a while to import, and leaves with its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    from raycomplete.cli import main as run

    run()


if __name__ == "__main__":
    main()
