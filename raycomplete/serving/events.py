"""Progress as server-sent events, which a client may leave and rejoin without missing any."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from raycomplete.serving.store import EvaluationStore
from raycomplete.serving.tables import Event, State

_POLL_S = 0.25  # runners are other processes: looking is the only way to hear of them
_RECONNECT_MS = 2000
_FINAL = frozenset(str(state) for state in State if state.final)


async def event_stream(
    store: EvaluationStore, identity: str, *, after: int, heartbeat_s: float, follow: bool
) -> AsyncIterator[str]:
    """Events of an evaluation until its final one.

    Args:
        store: Where they are read.
        identity: The evaluation.
        after: Number of the last event that the client has.
        heartbeat_s: Longest silence: without a sign, proxies close a connection and clients cannot tell a dead one.
        follow: Wait for events to come; otherwise end with those that there are.
    """
    yield f"retry: {_RECONNECT_MS}\n\n"
    spoken = time.monotonic()
    while True:
        events = await run_in_threadpool(store.events, identity, after=after)
        for event in events:
            yield _frame(event)
            after = event.seq
            if event.kind in _FINAL:
                return
        if events:
            spoken = time.monotonic()
        elif not follow or await _is_over(store, identity, after):
            return
        elif time.monotonic() - spoken >= heartbeat_s:
            yield ": heartbeat\n\n"
            spoken = time.monotonic()
        if not events:
            await asyncio.sleep(_POLL_S)


async def _is_over(store: EvaluationStore, identity: str, after: int) -> bool:
    """Whether a client that has everything came back: its last event was final, or lies beyond it."""
    evaluation = await run_in_threadpool(store.get, identity)
    return evaluation is None or (evaluation.state.final and not store.events(identity, after=after))


def _frame(event: Event) -> str:
    data = json.dumps({"time": event.time, **event.data})  # one line: JSON escapes line breaks
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n"
