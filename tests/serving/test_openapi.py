"""The interface against its own OpenAPI document: no 5xx, and no answer that the document does not describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from tests.serving.conftest import BEARER, Server

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

HOST = {"Host": "127.0.0.1"}
OPERATIONS = (
    "POST /v1/evaluations",
    "GET /v1/evaluations",
    "GET /v1/evaluations/{evaluation_id}",
    "DELETE /v1/evaluations/{evaluation_id}",
    "GET /v1/evaluations/{evaluation_id}/events",
    "GET /v1/evaluations/{evaluation_id}/samples",
    "GET /v1/options",
    "GET /healthz",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
)


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that works meanwhile, so that streams end."""
    state: Path = tmp_path_factory.mktemp("openapi") / "state"
    server = Server(state, chat=True, show_harmful=True, max_queued=20)
    server.work_meanwhile()
    yield server
    server.close()


@pytest.fixture(scope="module")
def schema(busy_server: Server) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", busy_server.app, headers=BEARER | HOST)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_as_documented(busy_server: Server, schema: Any, operation: str, mode: str) -> None:
    method, path = operation.split()
    finished = busy_server.submit(save_completions=True)
    cases = schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, is_known=st.booleans())
    def check(case: Any, is_known: bool) -> None:
        if is_known and "evaluation_id" in case.path_parameters:
            case.path_parameters["evaluation_id"] = finished
        case.call_and_validate(
            headers=BEARER | HOST,
            # What fits the schema may still be refused for what no schema can say: a foreign path, a full queue. And
            # what does not fit it is still fine where the known id took the place of the wrong part.
            excluded_checks=[checks.positive_data_acceptance, *([checks.negative_data_rejection] if is_known else [])],
        )

    try:
        check()
    except Unsatisfiable:
        assert mode == "negative", "an operation that takes nothing can be asked in no wrong way"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_token_is_refused_everywhere_but_in_health(schema: Any, operation: str) -> None:
    method, path = operation.split()
    case = schema[path][method].Case(
        path_parameters={"evaluation_id": "x", "name": "x"}, media_type="application/json", body={}
    )
    answer = case.call(headers={"Authorization": "Bearer wrong"} | HOST)
    assert answer.status_code == (200 if path == "/healthz" else 401)


def test_the_document_names_the_whole_interface(busy_server: Server) -> None:
    document = busy_server.client.get("/openapi.json").json()
    operations = {f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found}
    assert operations == set(OPERATIONS)
