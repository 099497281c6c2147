"""The HTTP interface: its routes, streams of events, metrics and OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from raycomplete import __version__
from raycomplete.attacks.registry import ATTACKS
from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import ModelRole, Outcome
from raycomplete.serving import schemas
from raycomplete.serving.gate import HEARTBEAT_S, Gate, add_errors, page
from raycomplete.serving.openai_api import Answers, add_openai
from raycomplete.serving.requests import MAX_PROMPTS, Admission, ForbiddenError
from raycomplete.serving.runner import read_samples
from raycomplete.serving.schemas import State
from raycomplete.serving.store import EvaluationStore, evaluation_folder

_POLL_S = 0.25  # runners are other processes: looking is the only way to hear of them
_RECONNECT_MS = 2000
_MAX_NUMBER = 2**53  # what JSON readers hold exactly
_Words = Annotated[str | None, Query(max_length=200)]
_Limit = Annotated[int, Query(ge=1, le=200)]
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["queued", "started", "progress", "waiting", "cancelling", *(s for s in State if s.final)]},
        "data": {"type": "string", "description": "JSON with the time and what belongs to the event"},
    },
}


@dataclass(frozen=True)
class Service:
    """Everything that the application works on."""

    admission: Admission
    store: EvaluationStore
    token_digest: str | None = None  # SHA-256 of the bearer token, if there is one
    chat: Mapping[str, Answers] = field(default_factory=dict)  # models that answer prompts, by name


def create_app(service: Service) -> ASGIApp:
    """Makes the application behind its gate."""
    problem = {"model": schemas.Problem, "description": "The reason why the request was not served."}
    app = FastAPI(
        title="raycomplete",
        version=__version__,
        summary="Adversarial evaluation of language models.",
        docs_url=None,  # both pages would fetch their scripts from elsewhere
        redoc_url=None,
        responses={"4XX": problem, "5XX": problem},
    )
    add_errors(app)
    # The dependency documents the token; the gate asks for it before any route is reached.
    api = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False, scheme_name="token"))])
    _add_evaluations(api, service)
    _add_surroundings(api, service)
    if service.chat:
        add_openai(api, service.chat, max_length=service.admission.config.models.max_length)
    app.include_router(api)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Answers ok if the queue can be read; needs no token."""
        service.store.counts()
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page())

    return Gate(app, service.token_digest)


def _add_evaluations(api: APIRouter, service: Service) -> None:
    serve, store = service.admission.config.serve, service.store

    def found(identity: str, evaluation: schemas.EvaluationView | None) -> schemas.EvaluationView:
        if evaluation is None:
            raise HTTPException(404, f"There is no evaluation {identity[:80]!r}.")
        return evaluation

    @api.post("/v1/evaluations", status_code=202)
    def submit(
        request: schemas.EvaluationRequest,
        response: Response,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> schemas.EvaluationView:
        """Queues an evaluation. The same Idempotency-Key never queues a second one, so retries are safe."""
        admitted = service.admission.admit(request)
        tree = admitted.model_dump(mode="json")
        evaluation, is_new = store.submit(tree, label=admitted.label, key=idempotency_key, max_queued=serve.max_queued)
        response.headers["Location"] = f"/v1/evaluations/{evaluation.id}"
        response.headers["Idempotent-Replayed"] = str(not is_new).lower()
        return evaluation

    @api.get("/v1/evaluations")
    def list_evaluations(
        limit: _Limit = 50,
        before: Annotated[int | None, Query(ge=0, le=_MAX_NUMBER)] = None,
        state: State | None = None,
        label: _Words = None,
    ) -> schemas.EvaluationPage:
        """Evaluations, newest first; `before` takes the `next` of the page before."""
        return store.page(limit=limit, before=before, state=state, label=label)

    @api.delete("/v1/evaluations/{evaluation_id}", status_code=202)
    def cancel(evaluation_id: str) -> schemas.EvaluationView:
        """Cancels what waits or runs, and keeps what was finished. One that ended stays as it is."""
        return found(evaluation_id, store.cancel(evaluation_id))

    @api.get("/v1/evaluations/{evaluation_id}")
    def get_evaluation(evaluation_id: str) -> schemas.EvaluationDetail:
        """One evaluation, with its results once it succeeded."""
        evaluation, results = found(evaluation_id, store.get(evaluation_id)), None
        if evaluation.state is State.SUCCEEDED:
            results = read_json(evaluation_folder(serve.state, evaluation_id) / "summary.json")
        return schemas.EvaluationDetail(**evaluation.model_dump(), results=results)

    @api.get(
        "/v1/evaluations/{evaluation_id}/events",
        response_class=EventSourceResponse,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT_SCHEMA}}}},
    )
    def stream_events(
        evaluation_id: str,
        last_event_id: Annotated[int, Header(ge=0, le=_MAX_NUMBER)] = 0,
        follow: Annotated[bool, Query(description="false: end with the events that there are")] = True,
    ) -> EventSourceResponse:
        """Progress as server-sent events; a client that comes back sends the last id that it saw."""
        found(evaluation_id, store.get(evaluation_id))
        return EventSourceResponse(
            _events(store, evaluation_id, after=last_event_id, follow=follow),
            ping=HEARTBEAT_S,
            ping_message_factory=lambda: ServerSentEvent(comment="heartbeat", sep="\n"),
            sep="\n",
        )

    @api.get("/v1/evaluations/{evaluation_id}/samples")
    def list_samples(
        evaluation_id: str,
        include_harmful: Annotated[bool, Query(description="also the text of responses to attacks")] = False,
        role: ModelRole | None = None,
        attack: _Words = None,
        outcome: Outcome | None = None,
        limit: _Limit = 50,
        offset: Annotated[int, Query(ge=0, le=_MAX_NUMBER)] = 0,
    ) -> schemas.SamplePage:
        """Responses that the evaluation kept (`save_completions`)."""
        found(evaluation_id, store.get(evaluation_id))
        if include_harmful and not serve.show_harmful:
            raise ForbiddenError("This server does not show harmful completions.", "serve.show_harmful allows it.")
        folder = evaluation_folder(serve.state, evaluation_id)
        wanted = {"role": role, "attack": attack, "outcome": outcome}
        return read_samples(folder, wanted, offset=offset, limit=limit, show_harmful=include_harmful)


def _add_surroundings(api: APIRouter, service: Service) -> None:
    admission, store = service.admission, service.store
    serve = admission.config.serve

    @api.get("/v1/options")
    def options() -> schemas.Options:
        """Everything that may be asked for here."""
        return schemas.Options(
            attacks=list(ATTACKS),
            models=admission.known_models(),
            model_roots=[str(root) for root in serve.model_roots],
            defaults=admission.config.evaluation.model_dump(mode="json"),
            max_prompts=MAX_PROMPTS,
            show_harmful=serve.show_harmful,
            chat=list(service.chat),
        )

    # A response class of plain text would document the errors as plain text too.
    plain = {"text/plain": {"schema": {"type": "string"}}}

    @api.get("/metrics", response_class=Response, responses={200: {"content": plain}})
    def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(generate_latest(_Metrics(store)), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _events(store: EvaluationStore, identity: str, *, after: int, follow: bool) -> AsyncIterator[dict[str, Any]]:
    """Yields the events of an evaluation until its final one; those that there are unless `follow`."""
    yield {"retry": _RECONNECT_MS}
    while True:
        evaluation = await run_in_threadpool(store.get, identity)  # before its events: a final state has all of them
        events = await run_in_threadpool(store.events, identity, after=after)
        for event in events:
            yield {"id": str(event.seq), "event": event.kind, "data": json.dumps({"time": event.time, **event.data})}
            after = event.seq
        if not events:
            if not follow or evaluation is None or evaluation.state.final:
                return
            await asyncio.sleep(_POLL_S)


@dataclass(frozen=True)
class _Metrics(Collector):
    """Metrics of the service, all from the store, so that every replica answers the same; Serve has those of HTTP."""

    store: EvaluationStore

    def collect(self) -> Iterator[Metric]:
        totals = self.store.totals()
        states = GaugeMetricFamily("raycomplete_evaluations", "Evaluations by state.", labels=["state"])
        for state, count in self.store.counts().items():
            states.add_metric([state], count)
        yield states
        yield GaugeMetricFamily("raycomplete_attempts", "Starts of evaluations, without stops.", totals["attempts"])
        about = "Time from start to end, over all evaluations that ended."
        yield CounterMetricFamily("raycomplete_evaluation_seconds_total", about, totals["seconds"])
        yield GaugeMetricFamily("raycomplete_queue_oldest_seconds", "Age of the oldest that waits.", totals["oldest"])
