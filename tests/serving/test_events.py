"""Server-sent events: complete, in order, and resumable at any point."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from raycomplete.serving.runner import _Follower
from tests.serving.conftest import Server


def frames(text: str) -> list[dict[str, Any]]:
    found = []
    for frame in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if ": " in line)
        if "id" in fields:
            found.append({"id": int(fields["id"]), "event": fields["event"], "data": json.loads(fields["data"])})
    return found


def test_a_stream_tells_everything_and_ends(server: Server) -> None:
    identity = server.submit(label="slow")
    server.work_meanwhile()
    answer = server.client.get(f"/v1/evaluations/{identity}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = frames(answer.text)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [event["event"] for event in events if event["event"] != "progress"] == ["queued", "started", "succeeded"]
    last = {event["data"]["role"]: event["data"]["done"] for event in events if event["event"] == "progress"}
    assert last == {"base": 6, "aligned": 6, "student": 6}


def test_a_stream_goes_on_after_any_event(server: Server) -> None:
    identity = server.submit()
    server.work()
    path = f"/v1/evaluations/{identity}/events"
    events = frames(server.client.get(path).text)
    for last in range(len(events) + 1):
        again = server.client.get(path, headers={"Last-Event-ID": str(last)})
        assert frames(again.text) == events[last:]
    assert server.client.get(path, headers={"Last-Event-ID": "10000"}).status_code == 200
    assert server.client.get(path, headers={"Last-Event-ID": "x"}).status_code == 422
    assert server.client.get("/v1/evaluations/none/events").status_code == 404


def test_a_stream_can_end_with_what_there_is(server: Server) -> None:
    identity = server.submit()
    answer = server.client.get(f"/v1/evaluations/{identity}/events", params={"follow": False})
    assert [event["event"] for event in frames(answer.text)] == ["queued"]


def test_silence_is_broken_by_heartbeats(make_server: Callable[..., Server]) -> None:
    server = make_server(event_heartbeat_s=0.3)
    identity = server.submit()
    timer = threading.Timer(1.5, server.work)
    timer.start()
    text = server.client.get(f"/v1/evaluations/{identity}/events").text
    timer.join()
    assert text.startswith("retry: 2000\n\nid: 1\nevent: queued\ndata: {")
    assert text.split("event: started")[0].count(": heartbeat\n\n") >= 2


@pytest.mark.parametrize("sizes", [(1, 1), (50, 3), (3, 50)])
def test_thinned_progress_keeps_the_last_word_on_each_part(sizes: tuple[int, int]) -> None:
    told: list[Any] = []
    follow: Callable[..., None] = _Follower(told.append)
    wanted = []
    for attack, size in zip(("prefill", "gcg"), sizes, strict=True):
        for done in range(size):
            follow({"role": "base", "attack": attack, "done": done})
        wanted.append((attack, size - 1))
    follow.flush()  # type: ignore[attr-defined]
    last = {progress["attack"]: progress["done"] for progress in told}
    assert list(last.items()) == wanted
    assert len(told) <= 5
