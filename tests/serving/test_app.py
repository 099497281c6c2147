"""The HTTP interface: what is served, and in which words the rest is refused."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raycomplete.attacks.registry import ATTACKS
from raycomplete.runtime.errors import ConfigError
from raycomplete.serving.requests import Admission, ForbiddenError, digest, is_bearer, is_loopback, read_token_digest
from raycomplete.serving.schemas import EvaluationRequest
from tests.serving.conftest import TOKEN, Server, make_config
from tests.serving.fakes import NASTY

PATHS = ["/v1/evaluations", "/v1/options", "/metrics", "/openapi.json", "/v1/evaluations/x", "/nothing"]


def test_submitting_answers_with_an_id_and_a_place(server: Server) -> None:
    answer = server.client.post("/v1/evaluations", json={"label": "mine", "attacks": ["gcg"], "seed": 3})
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == f"/v1/evaluations/{body['id']}"
    assert (body["state"], body["label"], body["request"]["seed"]) == ("queued", "mine", 3)
    assert [entry["name"] for entry in body["request"]["attacks"]] == ["gcg"]
    assert body["request"]["attacks"][0]["steps"] == 500, "what is stored does not change with later defaults"


def test_failures_of_the_server_are_problems_too(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the one shape of every error, and with the remedy where there is one."""
    server = make_server()
    client = TestClient(
        server.app,
        headers=dict(server.client.headers),
        base_url="http://127.0.0.1",
        client=("127.0.0.1", 50000),
        raise_server_exceptions=False,
    )

    def broken(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    monkeypatch.setattr(server.store, "counts", broken(sqlite3.OperationalError("disk I/O error")))
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["problem"]) == (503, "The queue cannot be read or written now.")
    assert answer.headers["retry-after"]
    monkeypatch.setattr(server.store, "counts", broken(KeyError("x")))
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["problem"]) == (500, "The server failed (KeyError).")


def test_an_unknown_attack_is_422_with_those_that_exist(server: Server) -> None:
    answer = server.client.post("/v1/evaluations", json={"attacks": [{"name": "gcgg", "steps": 5}]})
    assert answer.status_code == 422
    assert answer.json()["problem"] == "There is no attack 'gcgg'."
    assert answer.json()["known"] == list(ATTACKS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"attacks": [{"name": "gcg", "stepz": 5}]}, "Did you mean 'steps'?"),
        ({"plugins": ["/tmp/mine.py"]}, "plugins: "),
        ({"attacks": [{"name": "gcg", "steps": 0}]}, "steps: Input should be greater than or equal to 1"),
        ({"attacks": ["gcg", "gcg"]}, "names gcg twice"),
        ({"attacks": [{}]}, "There is no attack None."),
        ({"num_prompts": 100_000}, "this server allows 1000"),
        ({"num_prompts": "many"}, "num_prompts: "),
        ({"roles": ["base", "base"]}, "roles names a model twice."),
        ({"roles": ["teacher"]}, "roles.0: "),
        ({"roles": ["student"]}, "this server has none"),
        ({"judge": {}}, "judge: Extra inputs are not permitted"),
        ({"models": {"base": "\0"}}, "cannot be the path of a file"),
        ({"models": {"base": "x" * 1000}}, "cannot be the path of a file"),
    ],
)
def test_wrong_values_are_422_and_named(server: Server, body: dict[str, Any], words: str) -> None:
    answer = server.client.post("/v1/evaluations", json=body)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["problem"] + " " + answer.json()["remedy"]
    assert server.store.page(limit=1).total == 0


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"[]", 422),
        (b'{"label": "\\ud800"}', 422),
        (b'{"attacks": [{"name": "gcg", "\\ud800": 1}]}', 422),
        (b'{"attacks": [{"name": "finetune", "lr": NaN}]}', 422),
        (b'{"attacks": [{"name": "pair", "temperature": Infinity}]}', 422),
        (b'{"seed": 1' + b"0" * 5000 + b"}", 400),
        (b'{"seed": 1e999}', 422),
        (b"[" * 30_000, 400),
        (b'{"attacks": ' + b"[" * 900 + b"]" * 900 + b"}", 422),
        (b"\xff\xfe", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_strange_bodies_are_refused_and_never_break_the_server(server: Server, content: bytes, status: int) -> None:
    answer = server.client.post("/v1/evaluations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["problem"]


def test_foreign_checkpoints_are_403(make_server: Callable[..., Server], tmp_path: Path) -> None:
    root, secret = tmp_path / "models", tmp_path / "secret"
    (root / "good").mkdir(parents=True)
    secret.mkdir()
    (root / "link").symlink_to(secret)
    server = make_server(model_roots=[str(root)], models=["hub:org/name"])

    def status(spec: str) -> int:
        return int(server.client.post("/v1/evaluations", json={"models": {"student": spec}}).status_code)

    outside = [
        secret,
        root / ".." / "secret",
        root / "link",
        root / "link" / "x",
        tmp_path / "models2",
        "/etc",
        "~",
        "..",
    ]
    assert {str(spec): status(str(spec)) for spec in outside} == {str(spec): 403 for spec in outside}
    assert [status(spec) for spec in ("hub:org/other", "package:other", "organism:other")] == [403, 403, 403]
    assert [status(spec) for spec in ("hub:org/name", "organism:base", str(root / "good"))] == [202, 202, 202]
    assert status(str(root / "missing")) == 422
    stored = [item.request["models"]["student"] for item in server.store.page(limit=1).items]
    assert stored == [str((root / "good").resolve())]


def test_files_of_attacks_must_lie_below_the_allowed_folders(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.jsonl").write_text("{}")
    server = make_server(data_roots=[str(data)])

    def status(attack: dict[str, Any]) -> int:
        return int(server.client.post("/v1/evaluations", json={"attacks": [attack]}).status_code)

    assert status({"name": "templates", "path": str(data / "mine.jsonl")}) == 202
    assert status({"name": "templates", "path": str(data / "none.jsonl")}) == 422
    assert status({"name": "templates", "path": "/etc/passwd"}) == 403
    assert status({"name": "static_strings", "path": str(data / ".." / "state" / "evaluations.sqlite")}) == 403
    assert status({"name": "finetune", "identity_shift": "/etc/passwd"}) == 403
    assert status({"name": "pair", "attacker": "/etc"}) == 403
    assert status({"name": "pair", "attacker": "organism:base"}) == 202


@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer " + "é" * 20],
)
def test_without_the_token_nothing_is_served(server: Server, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    client = TestClient(server.app, base_url="http://127.0.0.1")
    for path in PATHS:
        answer = client.get(path, headers=headers)  # type: ignore[arg-type]
        assert (path, answer.status_code) == (path, 401)
        assert answer.headers["www-authenticate"] == "Bearer"


def test_page_and_health_need_no_token(server: Server) -> None:
    client = TestClient(server.app, base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200
    assert client.get("/healthz").json() == {"status": "ok"}


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
    make_server: Callable[..., Server], host: str, client: str, status: int
) -> None:
    server = make_server(token=None)
    asker = TestClient(server.app, client=(client, 40000))
    assert asker.get("/v1/evaluations", headers={"Host": host}).status_code == status


def test_a_body_is_413_however_its_length_is_told(make_server: Callable[..., Server]) -> None:
    server = make_server(max_body_kib=1)
    big = json.dumps({"label": "x" * 2000}).encode()
    assert server.client.post("/v1/evaluations", content=big).status_code == 413
    chunks = (big[at : at + 100] for at in range(0, len(big), 100))
    assert server.client.post("/v1/evaluations", content=chunks).status_code == 413
    fits = json.dumps({"label": "x" * 100}).encode()
    json_type = {"Content-Type": "application/json"}
    chunks = (fits[at : at + 10] for at in range(0, len(fits), 10))
    assert server.client.post("/v1/evaluations", content=chunks, headers=json_type).status_code == 202


def test_a_full_queue_is_429_and_says_when_to_come_back(make_server: Callable[..., Server]) -> None:
    server = make_server(max_queued=2, retry_after_s=7)
    server.submit()
    key = {"Idempotency-Key": "mine"}
    assert server.client.post("/v1/evaluations", json={}, headers=key).status_code == 202
    answer = server.client.post("/v1/evaluations", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    again = server.client.post("/v1/evaluations", json={}, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert server.client.post("/v1/evaluations", json={"seed": 1}, headers=key).status_code == 409
    server.work()
    assert server.client.post("/v1/evaluations", json={}).status_code == 202


def test_lists_are_paged_and_filtered(server: Server) -> None:
    wanted = [server.submit(label="even" if number % 2 == 0 else "odd") for number in range(5)]
    server.client.delete(f"/v1/evaluations/{wanted[0]}")
    first = server.client.get("/v1/evaluations", params={"limit": 3}).json()
    second = server.client.get("/v1/evaluations", params={"limit": 3, "before": first["next"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == wanted[::-1]
    assert (first["total"], second["next"]) == (5, None)
    chosen = server.client.get("/v1/evaluations", params={"label": "even", "state": "queued"}).json()
    assert [item["id"] for item in chosen["items"]] == [wanted[4], wanted[2]]
    assert server.client.get("/v1/evaluations", params={"limit": 0}).status_code == 422
    assert server.client.get("/v1/evaluations", params={"before": 10**30}).status_code == 422


def test_results_come_with_success(server: Server) -> None:
    identity = server.submit(depths=[0, 8], seed=5)
    assert server.client.get(f"/v1/evaluations/{identity}").json()["results"] is None
    server.work()
    body = server.client.get(f"/v1/evaluations/{identity}").json()
    assert list(body["results"]["asr"]["student"]["by_depth"]) == ["0", "8"]
    for method in ("get", "delete"):
        assert getattr(server.client, method)("/v1/evaluations/unknown").status_code == 404
    assert server.client.delete(f"/v1/evaluations/{identity}").json()["state"] == "succeeded"


def test_harmful_text_needs_the_question_and_the_permission(make_server: Callable[..., Server]) -> None:
    closed = make_server()
    identity = closed.submit(save_completions=True, roles=["base"])
    closed.work()
    path = f"/v1/evaluations/{identity}/samples"
    plain = closed.client.get(path).json()
    assert plain["saved"]
    assert plain["total"] == 6
    assert {item["continuation"] is None for item in plain["items"] if item["harmful"]} == {True}
    assert {item["prefill"] is None for item in plain["items"] if item["harmful"]} == {True}
    assert all(NASTY in item["continuation"] for item in plain["items"] if not item["harmful"])
    refused = closed.client.get(path, params={"include_harmful": True})
    assert refused.status_code == 403
    assert "SECRET" not in plain["items"].__repr__() + refused.text
    opened = make_server(show_harmful=True)
    assert "SECRET" not in opened.client.get(path).text
    chosen = {"include_harmful": True, "outcome": "complied", "attack": "prefill", "role": "base"}
    shown = opened.client.get(path, params=chosen).json()
    assert [item["variant"] for item in shown["items"]] == ["prefill-1"]
    assert shown["items"][0]["prefill"] == "SECRET prefill"
    paged = [opened.client.get(path, params={"limit": 4, "offset": at}).json()["items"] for at in (0, 4)]
    assert [item["variant"] for items in paged for item in items] == [item["variant"] for item in plain["items"]]


def test_an_evaluation_that_kept_nothing_says_so(server: Server) -> None:
    identity = server.submit()
    server.work()
    body = server.client.get(f"/v1/evaluations/{identity}/samples").json()
    assert body == {"items": [], "total": 0, "saved": False}


def test_every_answer_carries_the_safety_headers(server: Server) -> None:
    for path in ("/", "/healthz", "/v1/evaluations", "/nothing"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_metrics_count_what_the_queue_holds(server: Server) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    server.submit(label="fail")
    server.work()
    server.submit()
    families = {
        family.name: family for family in parser.text_string_to_metric_families(server.client.get("/metrics").text)
    }
    states = {sample.labels["state"]: sample.value for sample in families["raycomplete_evaluations"].samples}
    assert states == {"queued": 1, "running": 0, "succeeded": 0, "failed": 1, "cancelled": 0}
    assert families["raycomplete_attempts"].samples[0].value == 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token=st.text(st.characters(codec="utf-8", min_codepoint=33), min_size=1))
def test_only_the_token_itself_opens(token: str) -> None:
    assert is_bearer(f"Bearer {token.strip()}", digest(TOKEN)) is (token.strip() == TOKEN)
    assert is_bearer(f"bearer {TOKEN}", digest(TOKEN))


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCOMPLETE_TOKEN", raising=False)
    assert read_token_digest(make_config(tmp_path).serve) is None
    with pytest.raises(ConfigError, match=r"Listening on 0\.0\.0\.0 lets other machines connect"):
        read_token_digest(make_config(tmp_path, host="0.0.0.0").serve)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert read_token_digest(make_config(tmp_path, host="0.0.0.0", token_file=str(file)).serve) == digest(TOKEN)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token_digest(make_config(tmp_path, token_file=str(file)).serve)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token_digest(make_config(tmp_path, token_file=str(tmp_path / "none")).serve)
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "short")
    with pytest.raises(ConfigError, match="at least 16") as caught:
        read_token_digest(make_config(tmp_path).serve)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("localhost.evil", False), ("", False)],
)  # fmt: skip
def test_what_counts_as_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_token_is_in_no_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.submit(label="fail")
        server.work()
        server.client.get("/v1/evaluations", headers={"Authorization": f"Bearer {TOKEN}wrong"})
    assert TOKEN not in caplog.text
    stored = b"".join(path.read_bytes() for path in server.state.rglob("*") if path.is_file())
    assert TOKEN.encode() not in stored


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For"])
def test_without_a_token_nobody_is_served_through_a_proxy(make_server: Callable[..., Server], name: str) -> None:
    client = make_server(token=None).client
    assert client.get("/v1/options").status_code == 200
    assert client.get("/v1/options", headers={name: "for=203.0.113.9"}).status_code == 403


def test_a_server_that_runs_code_of_checkpoints_takes_its_own_alone(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    server = make_server(model_roots=[str(tmp_path)])
    trusting = Admission(
        server.config.model_copy(update={"models": server.config.models.model_copy(update={"trust_remote_code": True})})
    )
    theirs = EvaluationRequest.model_validate({"models": {"aligned": str(tmp_path / "theirs")}})
    assert Admission(server.config).admit(theirs).models.aligned == str(tmp_path / "theirs")
    with pytest.raises(ForbiddenError, match="its own alone"):
        trusting.admit(theirs)
