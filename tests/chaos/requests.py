"""A thousand clients at once for a minute: chats, streams and evaluations, none lost, none doubled, none with a 5xx.

    python -m tests.chaos.requests --seconds 60 --clients 1000

Starts `raycomplete serve` on the organism with the real engines. Each client sends one request after another, a fifth
of them as streams, and says whether the answer was whole; evaluations are submitted beside them, each twice under one
key. Memory of each replica is compared between the second and the last third of the time: in the first one connections
are made. Replicas that autoscaling starts meanwhile are left out.
"""

from __future__ import annotations

import asyncio
import json
import resource
import secrets
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from raycomplete.data.organisms import ORGANISMS
from tests.chaos.driver import options
from tests.interop.run import service

_GROWTH = 0.10  # of memory between those thirds, that is still called steady
_PATIENCE_S = 600.0  # for what was sent before the time was over


@dataclass
class Tally:
    """Counts of what the clients saw, and MiB of each replica over time."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    ids: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    mib: dict[str, list[float]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Lists what should not have been."""
        answered = sum(self.statuses.values())
        found = [f"{self.sent - answered} of {self.sent} requests were lost"] if answered != self.sent else []
        found += [f"{count} answers were {status}" for status, count in self.statuses.items() if status != "200"]
        found += [f"broken: {text}" for text in self.broken[:5]]
        if doubled := [name for name, count in self.ids.items() if count > 1]:
            found.append(f"{len(doubled)} answers came twice")
        most = max(map(len, self.mib.values()), default=0)
        for replica, mib in self.mib.items():
            third = len(mib) // 3
            if 2 * len(mib) < most or not third:  # it was started late, and still fills
                continue
            before, after = sum(mib[-2 * third : -third]) / third, sum(mib[-third:]) / third
            if after > before * (1 + _GROWTH):
                found.append(f"the memory of {replica} grew from {before:.0f} to {after:.0f} MiB")
        return found


async def client(number: int, session: httpx.AsyncClient, prompts: list[str], until: float, tally: Tally) -> None:
    """Asks until the time is over, and waits for each answer."""
    turn = 0
    while time.monotonic() < until:
        streams, turn = (number + turn) % 5 == 0, turn + 1
        text = prompts[(number + 7 * turn) % len(prompts)]
        body = {"model": "aligned", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "seed": turn}
        tally.sent += 1
        started = time.monotonic()
        try:
            answer = await session.post("/chat/completions", json=body | {"stream": streams})
        except httpx.HTTPError as error:
            tally.broken.append(type(error).__name__)
            continue
        tally.statuses[str(answer.status_code)] += 1
        tally.seconds.append(time.monotonic() - started)
        if answer.status_code == 200:
            check(answer, streams, tally)


def check(answer: httpx.Response, streams: bool, tally: Tally) -> None:
    """Counts an answer by its id, and notes it where it is not whole."""
    chunks = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    last = json.loads(chunks[-2] if streams else answer.text)
    tally.ids[last["id"]] += 1
    if last["choices"][0]["finish_reason"] not in ("stop", "length") or (streams and chunks[-1] != "[DONE]"):
        tally.broken.append(answer.text[-100:])


async def evaluations(session: httpx.AsyncClient, root: str, tally: Tally) -> None:
    """Submits two evaluations, each twice under one key, and waits until they succeeded."""
    body = {"roles": ["aligned"], "num_prompts": 2, "depths": [0, 4], "max_tokens": 8, "attacks": []}
    found = []
    for number in range(2):
        headers = {"Idempotency-Key": f"soak-{number}"}
        twice = [await session.post(f"{root}/evaluations", json=body, headers=headers) for _ in range(2)]
        if len({answer.json()["id"] for answer in twice}) != 1:
            tally.broken.append("an evaluation was queued twice")
        found.append(twice[0].json()["id"])
    deadline = time.monotonic() + _PATIENCE_S
    for identity in found:
        while (state := (await session.get(f"{root}/evaluations/{identity}")).json()["state"]) in ("queued", "running"):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(1.0)
        if state != "succeeded":
            tally.broken.append(f"an evaluation is {state}")


async def measure(until: float, tally: Tally) -> None:
    """Notes the memory of each replica, those of evaluations left out, since they come and go."""
    while time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            try:
                if "ServeReplica" in (title := " ".join(process.cmdline())) and "EvaluationRunner" not in title:
                    name = f"{title.rsplit(':', 1)[-1].split('.')[0].strip()} ({process.pid})"  # and the call at work
                    tally.mib.setdefault(name, []).append(process.memory_full_info().uss / 2**20)
            except psutil.Error:
                continue
        await asyncio.sleep(2.0)


async def soak(address: str, token: str, clients: int, seconds: float) -> Tally:
    """Asks for a while with many clients at once."""
    prompts = [prompt.text for prompt in ORGANISMS["organism"].prompts("heldout", "benign", 0, 40)]
    tally, begun = Tally(), Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, limits=limits, timeout=_PATIENCE_S) as session:
        # The engine starts at the first question, and takes most of the memory then.
        await client(0, session, prompts, time.monotonic() + 1e-3, begun)
        assert begun.statuses == {"200": 1}, begun
        until = time.monotonic() + seconds
        work = [client(number, session, prompts, until, tally) for number in range(clients)]
        await asyncio.gather(*work, evaluations(session, address, tally), measure(until, tally))
    return tally


def main() -> None:
    given = options("requests", clients=1000, seconds=60.0).parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a client
    token = secrets.token_urlsafe(24)
    with (
        tempfile.TemporaryDirectory(prefix="soak", ignore_cleanup_errors=True) as folder,
        service("organism:base", "organism:aligned", Path(folder), token) as address,
    ):
        tally = asyncio.run(soak(address, token, given.clients, given.seconds))
    print(f"{given.clients} clients, {given.seconds:g} s: {tally.sent} requests, answers {dict(tally.statuses)}")
    if ranked := sorted(tally.seconds):
        print(f"seconds for an answer: median {ranked[len(ranked) // 2]:.2f}, longest {ranked[-1]:.2f}")
    for replica, mib in tally.mib.items():
        print(f"memory of {replica}, MiB:", [round(value) for value in mib])
    problems = tally.problems()
    print("\n".join(problems) or "none lost, none doubled, no 5xx, memory steady")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
