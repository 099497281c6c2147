"""The HTTP interface: what it serves and refuses, its streams of events, and the page."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import sqlite3
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raycomplete.attacks.registry import ATTACKS
from raycomplete.runtime.errors import ConfigError
from raycomplete.serving import app
from raycomplete.serving.gate import MAX_BODY, content_security_policy, page
from raycomplete.serving.requests import Admission, ForbiddenError, digest, is_bearer, is_loopback, read_token_digest
from raycomplete.serving.schemas import EvaluationRequest
from tests.serving.conftest import TOKEN, Server, make_config
from tests.serving.fakes import NASTY, frames

PLACE = "/v1/evaluations"
JSON = {"Content-Type": "application/json"}
MakeServer = Callable[..., Server]


def test_submitting_answers_with_an_id_and_a_place(server: Server) -> None:
    answer = server.client.post(PLACE, json={"label": "mine", "attacks": ["gcg"], "seed": 3})
    body = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"{PLACE}/{body['id']}")
    assert (body["state"], body["label"], body["request"]["seed"]) == ("queued", "mine", 3)
    assert [entry["name"] for entry in body["request"]["attacks"]] == ["gcg"]
    assert body["request"]["attacks"][0]["steps"] == 500, "what is stored does not change with later defaults"


@pytest.mark.parametrize(("error", "status"), [(sqlite3.OperationalError("disk"), 503), (KeyError("x"), 500)])
def test_failures_of_the_server_are_problems_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail() -> Any:
        raise error

    monkeypatch.setattr(server.store, "counts", fail)
    client = TestClient(server.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    answer = client.get("/healthz")
    assert (answer.status_code, bool(answer.json()["problem"])) == (status, True)
    assert ("retry-after" in answer.headers) is (status == 503)


@pytest.mark.parametrize(
    ("content", "status", "named"),
    [
        (b'{"attacks": [{"name": "gcgg", "steps": 5}]}', 422, "gcgg"),
        (b'{"attacks": [{"name": "gcg", "stepz": 5}]}', 422, "'steps'"),
        (b'{"attacks": [{"name": "gcg", "steps": 0}]}', 422, "steps"),
        (b'{"attacks": ["gcg", "gcg"]}', 422, "gcg"),
        (b'{"attacks": [{}]}', 422, "None"),
        (b'{"plugins": ["/tmp/mine.py"]}', 422, "plugins"),
        (b'{"num_prompts": 100000}', 422, "num_prompts"),
        (b'{"num_prompts": "many"}', 422, "num_prompts"),
        (b'{"roles": ["base", "base"]}', 422, "roles"),
        (b'{"roles": ["teacher"]}', 422, "roles"),
        (b'{"roles": ["student"]}', 422, "roles"),
        (b'{"judge": {}}', 422, "judge"),
        (b'{"models": {"base": "\\u0000"}}', 422, "path"),
        (b'{"models": {"base": "' + b"x" * 1000 + b'"}}', 422, "path"),
        # bodies that are no request
        (b"", 422, ""),
        (b"{", 400, "JSON"),
        (b"[]", 422, ""),
        (b'{"label": "\\ud800"}', 422, ""),
        (b'{"attacks": [{"name": "gcg", "\\ud800": 1}]}', 422, ""),
        (b'{"attacks": [{"name": "finetune", "lr": NaN}]}', 422, ""),
        (b'{"attacks": [{"name": "pair", "temperature": Infinity}]}', 422, ""),
        (b'{"seed": 1' + b"0" * 5000 + b"}", 400, ""),
        (b'{"seed": 1e999}', 422, ""),
        (b"[" * 30_000, 400, ""),
        (b'{"attacks": ' + b"[" * 900 + b"]" * 900 + b"}", 422, ""),
        (b"\xff\xfe", 400, ""),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_bodies_are_refused_and_named(server: Server, content: bytes, status: int, named: str) -> None:
    answer = server.client.post(PLACE, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert named in problem["problem"] + problem["remedy"]
    assert problem["known"] == (list(ATTACKS) if named in ("gcgg", "None") else None)
    assert server.store.page(limit=1).total == 0


def test_foreign_checkpoints_are_403(make_server: MakeServer, tmp_path: Path) -> None:
    root, secret = tmp_path / "models", tmp_path / "secret"
    (root / "good").mkdir(parents=True)
    secret.mkdir()
    (root / "link").symlink_to(secret)
    server = make_server(model_roots=[str(root)], models=["hub:org/name"])
    outside = [secret, root / ".." / "secret", root / "link", root / "link" / "x", tmp_path / "models2", "/etc", "~"]
    expected = {str(spec): 403 for spec in (*outside, "..", "hub:org/other", "package:other", "organism:other")}
    expected |= dict.fromkeys(("hub:org/name", "organism:base", str(root / "good")), 202)
    expected[str(root / "missing")] = 422
    found = {spec: server.client.post(PLACE, json={"models": {"student": spec}}).status_code for spec in expected}
    assert found == expected
    theirs = EvaluationRequest.model_validate({"models": {"aligned": str(root / "good")}})
    assert Admission(server.config).admit(theirs).models.aligned == str((root / "good").resolve())
    trusted = server.config.models.model_copy(update={"trust_remote_code": True})
    with pytest.raises(ForbiddenError):  # a server that runs code of checkpoints takes its own alone
        Admission(server.config.model_copy(update={"models": trusted})).admit(theirs)


def test_files_of_attacks_must_lie_below_the_allowed_folders(make_server: MakeServer, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.jsonl").write_text("{}")
    server = make_server(data_roots=[str(data)])
    for attack, status in (
        ({"name": "templates", "path": str(data / "mine.jsonl")}, 202),
        ({"name": "templates", "path": str(data / "none.jsonl")}, 422),
        ({"name": "templates", "path": "/etc/passwd"}, 403),
        ({"name": "static_strings", "path": str(data / ".." / "state" / "evaluations.sqlite")}, 403),
        ({"name": "finetune", "identity_shift": "/etc/passwd"}, 403),
        ({"name": "pair", "attacker": "/etc"}, 403),
        ({"name": "pair", "attacker": "organism:base"}, 202),
    ):
        assert server.client.post(PLACE, json={"attacks": [attack]}).status_code == status, attack


@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer " + "é" * 20],
)
def test_without_the_token_only_page_and_health_are_served(server: Server, header: str | None) -> None:
    headers: Any = {} if header is None else {"Authorization": header.encode("latin-1")}
    client = TestClient(server.app, base_url="http://127.0.0.1")
    for path in (PLACE, "/v1/options", "/metrics", "/openapi.json", f"{PLACE}/x", "/nothing"):
        answer = client.get(path, headers=headers)
        assert (path, answer.status_code, answer.headers["www-authenticate"]) == (path, 401, "Bearer")
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/healthz", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "client", "status"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 200),
        ("localhost", "127.0.0.1", 200),
        ("[::1]:8000", "::1", 200),
        ("evil.example", "127.0.0.1", 403),
        ("127.0.0.1.evil.example", "127.0.0.1", 403),
        ("127.0.0.1", "192.0.2.7", 403),
        ("", "127.0.0.1", 403),
    ],
)
def test_without_a_token_only_this_machine_is_served(
    make_server: MakeServer, host: str, client: str, status: int
) -> None:
    asker = TestClient(make_server(token=None).app, client=(client, 40000))
    assert asker.get(PLACE, headers={"Host": host}).status_code == status
    for proxy in ("Forwarded", "X-Forwarded-For"):
        assert asker.get(PLACE, headers={"Host": host, proxy: "for=203.0.113.9"}).status_code == 403


def test_a_body_is_413_however_its_length_is_told(server: Server) -> None:
    def parts(body: bytes) -> Any:
        return (body[at : at + 1000] for at in range(0, len(body), 1000))

    big, fits = (json.dumps({"label": "x" * 100}).encode().ljust(MAX_BODY + more) for more in (1, 0))
    assert server.client.post(PLACE, content=big).status_code == 413
    assert server.client.post(PLACE, content=parts(big)).status_code == 413
    assert server.client.post(PLACE, content=parts(fits), headers=JSON).status_code == 202


def test_a_full_queue_is_429_and_says_when_to_come_back(make_server: MakeServer) -> None:
    server = make_server(max_queued=2)
    server.submit()
    key = {"Idempotency-Key": "mine"}
    assert server.client.post(PLACE, json={}, headers=key).status_code == 202
    answer = server.client.post(PLACE, json={})
    assert (answer.status_code, int(answer.headers["retry-after"]) > 0) == (429, True)
    again = server.client.post(PLACE, json={}, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert server.client.post(PLACE, json={"seed": 1}, headers=key).status_code == 409
    server.work()
    assert server.client.post(PLACE, json={}).status_code == 202


def test_lists_are_paged_and_filtered(server: Server) -> None:
    wanted = [server.submit(label="even" if number % 2 == 0 else "odd") for number in range(5)]
    server.client.delete(f"{PLACE}/{wanted[0]}")
    first = server.client.get(PLACE, params={"limit": 3}).json()
    second = server.client.get(PLACE, params={"limit": 3, "before": first["next"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == wanted[::-1]
    assert (first["total"], second["next"]) == (5, None)
    chosen = server.client.get(PLACE, params={"label": "even", "state": "queued"}).json()
    assert [item["id"] for item in chosen["items"]] == [wanted[4], wanted[2]]
    for wrong in ({"limit": 0}, {"before": 10**30}):
        assert server.client.get(PLACE, params=wrong).status_code == 422


def test_results_come_with_success(server: Server) -> None:
    identity = server.submit(depths=[0, 8], seed=5)
    path = f"{PLACE}/{identity}"
    assert server.client.get(path).json()["results"] is None
    server.work()
    assert list(server.client.get(path).json()["results"]["asr"]["student"]["by_depth"]) == ["0", "8"]
    assert server.client.get(f"{path}/samples").json() == {"items": [], "total": 0, "saved": False}
    assert server.client.delete(path).json()["state"] == "succeeded"
    for method in ("GET", "DELETE"):
        assert server.client.request(method, f"{PLACE}/unknown").status_code == 404


def test_harmful_text_needs_the_question_and_the_permission(make_server: MakeServer) -> None:
    closed = make_server()
    identity = closed.submit(save_completions=True, roles=["base"])
    closed.work()
    path = f"{PLACE}/{identity}/samples"
    plain = closed.client.get(path).json()
    assert (plain["saved"], plain["total"]) == (True, 6)
    for item in plain["items"]:
        withheld = (item["continuation"] is None, item["prefill"] is None)
        assert withheld == (item["harmful"], item["harmful"])
        assert item["harmful"] or NASTY in item["continuation"]
    refused = closed.client.get(path, params={"include_harmful": True})
    assert refused.status_code == 403
    opened = make_server(show_harmful=True)
    assert "SECRET" not in repr(plain) + refused.text + opened.client.get(path).text
    chosen: Any = {"include_harmful": True, "outcome": "complied", "attack": "prefill", "role": "base"}
    shown = opened.client.get(path, params=chosen).json()
    assert [(item["variant"], item["prefill"]) for item in shown["items"]] == [("prefill-1", "SECRET prefill")]
    paged = [opened.client.get(path, params={"limit": 4, "offset": at}).json()["items"] for at in (0, 4)]
    assert [item["variant"] for items in paged for item in items] == [item["variant"] for item in plain["items"]]


def test_every_answer_carries_the_safety_headers(server: Server) -> None:
    for path in ("/", "/healthz", PLACE, "/nothing"):
        headers = server.client.get(path).headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_metrics_count_what_the_queue_holds(server: Server) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    server.submit(label="fail")
    server.work()
    server.submit()
    found = {
        item.name: item.samples for item in parser.text_string_to_metric_families(server.client.get("/metrics").text)
    }
    states = {sample.labels["state"]: sample.value for sample in found["raycomplete_evaluations"]}
    assert states == {"queued": 1, "running": 0, "succeeded": 0, "failed": 1, "cancelled": 0}
    assert found["raycomplete_attempts"][0].value == 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token=st.text(st.characters(codec="utf-8", min_codepoint=33), min_size=1))
def test_only_the_token_itself_opens(token: str) -> None:
    assert is_bearer(f"Bearer {token.strip()}", digest(TOKEN)) is (token.strip() == TOKEN)
    assert is_bearer(f"bearer {TOKEN}", digest(TOKEN))


def test_sources_of_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCOMPLETE_TOKEN", raising=False)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert read_token_digest(make_config(tmp_path).serve) is None
    assert read_token_digest(make_config(tmp_path, host="0.0.0.0", token_file=str(file)).serve) == digest(TOKEN)
    file.write_text("\n")
    for wrong in ({"host": "0.0.0.0"}, {"token_file": str(file)}, {"token_file": str(tmp_path / "none")}):
        with pytest.raises(ConfigError):
            read_token_digest(make_config(tmp_path, **wrong).serve)
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "short")
    with pytest.raises(ConfigError) as caught:
        read_token_digest(make_config(tmp_path).serve)
    assert "short" not in str(caught.value)


def test_addresses_of_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "localhost.evil", "")))


def test_the_token_is_in_no_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.submit(label="fail")
        server.work()
        server.client.get(PLACE, headers={"Authorization": f"Bearer {TOKEN}wrong"})
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in server.state.rglob("*") if path.is_file())


# ---- events


def test_a_stream_tells_everything_and_ends(server: Server) -> None:
    identity = server.submit(label="slow")
    server.work_meanwhile()
    answer = server.client.get(f"{PLACE}/{identity}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = frames(answer.text)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [event["event"] for event in events if event["event"] != "progress"] == ["queued", "started", "succeeded"]
    last = {event["data"]["role"]: event["data"]["done"] for event in events if event["event"] == "progress"}
    assert last == {"base": 6, "aligned": 6, "student": 6}


def test_a_stream_goes_on_after_any_event(server: Server) -> None:
    identity = server.submit()
    path = f"{PLACE}/{identity}/events"
    queued = server.client.get(path, params={"follow": False})
    assert [event["event"] for event in frames(queued.text)] == ["queued"]
    server.work()
    events = frames(server.client.get(path).text)
    for last in range(len(events) + 1):
        again = server.client.get(path, headers={"Last-Event-ID": str(last)})
        assert frames(again.text) == events[last:]
    assert server.client.get(path, headers={"Last-Event-ID": "10000"}).status_code == 200
    assert server.client.get(path, headers={"Last-Event-ID": "x"}).status_code == 422
    assert server.client.get(f"{PLACE}/none/events").status_code == 404


def test_silence_is_broken_by_heartbeats(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "HEARTBEAT_S", 0.3)
    identity = server.submit()
    timer = threading.Timer(1.5, server.work)
    timer.start()
    text = server.client.get(f"{PLACE}/{identity}/events").text
    timer.join()
    assert text.startswith("retry: 2000\n\nid: 1\nevent: queued\ndata: {")
    assert text.split("event: started")[0].count(": heartbeat\n\n") >= 2


# ---- the page as text: whole, self-contained, and without a way in for markup


class Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self._open = ""
        self.feed(page())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inside[self._open] = self.inside.get(self._open, "") + data


def test_the_page_is_whole_and_fetches_nothing_from_elsewhere() -> None:
    parts = Parts()
    for tag in ("script", "style"):
        hashed = base64.b64encode(hashlib.sha256(parts.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{hashed}'" in content_security_policy()
    assert [tag for tag, attributes in parts.tags if "src" in attributes] == []
    assert [attributes["href"] for tag, attributes in parts.tags if tag == "link"] == ["data:,"]
    assert set(re.findall(r"https?://[^\"'`\s]+", page())) == {"http://www.w3.org/2000/svg"}, "a name space"
    for word in ("@import", "url(", "/*SCRIPT*/", "/*STYLE*/"):
        assert word not in page()
    there = {attributes["id"] for _, attributes in parts.tags if "id" in attributes}
    assert set(re.findall(r'byId\("([^"]+)"\)', parts.inside["script"])) <= there


def test_nothing_in_the_script_parses_markup() -> None:
    parts = Parts()
    ways_in = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval(")
    assert [word for word in (*ways_in, "Function(", "localStorage") if word in parts.inside["script"]] == []
    assert [attributes for _, attributes in parts.tags if any(name.startswith("on") for name in attributes)] == []


def test_every_control_has_a_name() -> None:
    parts, source = Parts(), page().replace("\n", " ")
    labelled = {attributes.get("for") for tag, attributes in parts.tags if tag == "label"}
    for tag, attributes in parts.tags:
        if tag in ("input", "select"):
            identity = attributes["id"]
            assert identity in labelled or re.search(rf'<label[^>]*>[^<]*<{tag} id="{identity}"', source), identity
