"""The HTTP interface."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from raycomplete import __version__
from raycomplete.attacks.registry import ATTACKS, UnknownAttackError
from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.runtime.types import ModelRole, Outcome
from raycomplete.serving.backend import ChatBackend
from raycomplete.serving.events import event_stream
from raycomplete.serving.gate import Gate, problem
from raycomplete.serving.metrics import CONTENT_TYPE, render_metrics
from raycomplete.serving.page import content_security_policy, page
from raycomplete.serving.requests import Admission, ForbiddenError
from raycomplete.serving.results import read_results, read_samples
from raycomplete.serving.runner import evaluation_folder
from raycomplete.serving.schemas import (
    CompletionChoice,
    CompletionRequest,
    CompletionView,
    EvaluationDetail,
    EvaluationPage,
    EvaluationRequest,
    EvaluationView,
    Health,
    Options,
    Problem,
    SamplePage,
)
from raycomplete.serving.store import EvaluationStore, KeyReusedError, QueueFullError
from raycomplete.serving.tables import Evaluation, State

logger = logging.getLogger(__name__)

_MAX_NUMBER = 2**53  # what JSON readers hold exactly
_Number = Annotated[int | None, Query(ge=0, le=_MAX_NUMBER)]
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["queued", "started", "progress", "waiting", "cancelling", *(s for s in State if s.final)]},
        "data": {"type": "string", "description": "JSON with the time and what belongs to the event"},
    },
}
_ABOUT = {
    400: "The body is no JSON.",
    401: "The token is missing or wrong.",
    403: "Not among what this server allows.",
    404: "There is no such evaluation.",
    409: "The idempotency key belongs to another request.",
    413: "The body is too large.",
    422: "A value is wrong.",
    429: "The queue is full.",
    503: "Not ready.",
}


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What an operation may answer beside its result. Any may be refused at the gate."""
    return {code: {"model": Problem, "description": _ABOUT[code]} for code in sorted({*codes, 401, 403})}


@dataclass(frozen=True)
class Service:
    """What the application works on.

    Attributes:
        admission: What requests may ask for.
        store: The queue.
        token_digest: SHA-256 of the bearer token, if there is one.
        chat: Answers single prompts, if this server does that.
    """

    admission: Admission
    store: EvaluationStore
    token_digest: str | None = None
    chat: ChatBackend | None = None


def create_app(service: Service) -> ASGIApp:
    """The application behind its gate."""
    app = create_api(service)
    serve = service.admission.config.serve
    return Gate(app, service.token_digest, serve.max_body_kib * 1024, content_security_policy())


def create_api(service: Service) -> FastAPI:
    """The application alone: its routes and their documentation."""
    app = FastAPI(
        title="raycomplete",
        version=__version__,
        summary="Adversarial evaluation of language models.",
        docs_url=None,  # both pages would fetch their scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    _add_evaluations(app, service)
    _add_reading(app, service)
    _add_surroundings(app, service)
    if service.chat is not None:
        _add_chat(app, service, service.chat)
    _document_token(app)
    return app


def _add_evaluations(app: FastAPI, service: Service) -> None:
    serve, store = service.admission.config.serve, service.store

    @app.post(
        "/v1/evaluations",
        status_code=202,
        response_model=EvaluationView,
        responses=_problems(400, 409, 413, 422, 429),
    )
    def submit(
        request: EvaluationRequest,
        response: Response,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> Any:
        """Queues an evaluation. The same Idempotency-Key never queues a second one, so retries are safe."""
        admitted = service.admission.admit(request)
        try:
            evaluation, is_new = store.submit(
                admitted.model_dump(mode="json"),
                label=admitted.label,
                key=idempotency_key,
                max_queued=serve.max_queued,
            )
        except QueueFullError as error:
            refusal = problem(429, error.problem, error.remedy)
            refusal.headers["Retry-After"] = str(serve.retry_after_s)
            return refusal
        except KeyReusedError as error:
            return problem(409, error.problem, error.remedy)
        response.headers["Location"] = f"/v1/evaluations/{evaluation.id}"
        response.headers["Idempotent-Replayed"] = str(not is_new).lower()
        return view(evaluation)

    @app.get("/v1/evaluations", responses=_problems(422))
    def list_evaluations(
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: _Number = None,
        state: State | None = None,
        label: Annotated[str | None, Query(max_length=200)] = None,
    ) -> EvaluationPage:
        """Evaluations, newest first; `before` takes the `next` of the page before."""
        items, total = store.page(limit=limit, before=before, state=state, label=label)
        following = items[-1].number if len(items) == limit and items[-1].number > 1 else None
        return EvaluationPage(items=[view(item) for item in items], total=total, next=following)

    @app.delete("/v1/evaluations/{evaluation_id}", status_code=202, responses=_problems(404, 413))
    def cancel(evaluation_id: str) -> EvaluationView:
        """Cancels what waits or runs, and keeps what was finished. One that ended stays as it is."""
        return view(_found(store.cancel(evaluation_id), evaluation_id))


def _add_reading(app: FastAPI, service: Service) -> None:
    serve, store = service.admission.config.serve, service.store

    @app.get("/v1/evaluations/{evaluation_id}", responses=_problems(404))
    def get_evaluation(evaluation_id: str) -> EvaluationDetail:
        """One evaluation, with its results once it succeeded."""
        evaluation = _found(store.get(evaluation_id), evaluation_id)
        results = None
        if evaluation.state is State.SUCCEEDED:
            results = read_results(evaluation_folder(serve.state, evaluation_id))
        return EvaluationDetail(**view(evaluation).model_dump(), results=results)

    @app.get(
        "/v1/evaluations/{evaluation_id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT_SCHEMA}}}, **_problems(404, 422)},
    )
    def stream_events(
        evaluation_id: str,
        last_event_id: Annotated[int, Header(ge=0, le=_MAX_NUMBER)] = 0,
        follow: Annotated[bool, Query(description="false: end with the events that there are")] = True,
    ) -> StreamingResponse:
        """Progress as server-sent events; a client that comes back sends the last id that it saw."""
        _found(store.get(evaluation_id), evaluation_id)
        stream = event_stream(
            store, evaluation_id, after=last_event_id, heartbeat_s=serve.event_heartbeat_s, follow=follow
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @app.get("/v1/evaluations/{evaluation_id}/samples", responses=_problems(404, 422))
    def list_samples(
        evaluation_id: str,
        include_harmful: Annotated[bool, Query(description="also the text of responses to attacks")] = False,
        role: ModelRole | None = None,
        attack: Annotated[str | None, Query(max_length=200)] = None,
        outcome: Outcome | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        offset: Annotated[int, Query(ge=0, le=_MAX_NUMBER)] = 0,
    ) -> SamplePage:
        """Responses that the evaluation kept (`save_completions`)."""
        _found(store.get(evaluation_id), evaluation_id)
        if include_harmful and not serve.show_harmful:
            raise ForbiddenError("This server does not show harmful completions.", "serve.show_harmful allows it.")
        return read_samples(
            evaluation_folder(serve.state, evaluation_id),
            offset=offset,
            limit=limit,
            show_harmful=include_harmful,
            role=role,
            attack=attack,
            outcome=outcome,
        )


def _add_surroundings(app: FastAPI, service: Service) -> None:
    admission, store = service.admission, service.store
    serve = admission.config.serve

    @app.get("/v1/options", responses=_problems())
    def options() -> Options:
        """What may be asked for here."""
        return Options(
            attacks=list(ATTACKS),
            models=admission.known_models(),
            model_roots=[str(root) for root in serve.model_roots],
            defaults=admission.config.evaluation.model_dump(mode="json"),
            max_prompts=serve.max_prompts,
            show_harmful=serve.show_harmful,
            chat=service.chat is not None,
        )

    @app.get("/healthz", responses=_problems(503))
    def healthz() -> Health:
        """Whether the queue can be read."""
        store.counts()
        return Health(status="ok")

    @app.get(
        "/metrics",
        response_class=Response,  # that of plain text would document its errors as plain text too
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_problems()},
    )
    def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(render_metrics(store), media_type=CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page())


def _add_chat(app: FastAPI, service: Service, chat: ChatBackend) -> None:
    serve = service.admission.config.serve

    @app.post("/v1/completions", responses=_problems(400, 413, 422, 503))
    async def complete(request: CompletionRequest) -> CompletionView:
        """The student's own answer to one prompt, for spot checks."""
        if request.max_tokens > serve.max_chat_tokens:
            request = request.model_copy(update={"max_tokens": serve.max_chat_tokens})
        found = await chat.complete(request)
        return CompletionView(
            id=f"cmpl-{time.time_ns():x}",
            created=int(time.time()),
            model=request.model,
            choices=[CompletionChoice(index=0, text=found.text, finish_reason=found.finish_reason)],
            usage={
                "prompt_tokens": found.prompt_tokens,
                "completion_tokens": found.completion_tokens,
                "total_tokens": found.prompt_tokens + found.completion_tokens,
            },
        )


def view(evaluation: Evaluation) -> EvaluationView:
    """An evaluation as clients see it."""
    values = asdict(evaluation)
    cancelling = values.pop("cancel") and not evaluation.state.final
    values.pop("number")
    return EvaluationView(**values, cancelling=cancelling)


def _found(evaluation: Evaluation | None, identity: str) -> Evaluation:
    if evaluation is None:
        raise HTTPException(404, f"There is no evaluation {identity[:80]!r}.")
    return evaluation


def _add_errors(app: FastAPI) -> None:
    """One shape for every error, which repeats nothing that the client sent beyond what the sentence needs."""

    @app.exception_handler(RefusedError)
    def refused(_: Request, error: RefusedError) -> JSONResponse:
        known = error.known if isinstance(error, UnknownAttackError) else None
        status = 403 if isinstance(error, ForbiddenError) else 422
        return problem(status, _clean(error.problem), _clean(error.remedy), known=known)

    @app.exception_handler(RaycompleteError)
    def failed(_: Request, error: RaycompleteError) -> JSONResponse:
        return problem(503, _clean(error.problem), _clean(error.remedy))

    @app.exception_handler(sqlite3.Error)
    def unreadable(_: Request, error: sqlite3.Error) -> JSONResponse:
        logger.error("The queue cannot be read or written: %s", error)
        answer = problem(503, "The queue cannot be read or written now.", "Try again; the server's log says why.")
        answer.headers["Retry-After"] = "5"
        return answer

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> JSONResponse:
        return problem(500, f"The server failed ({type(error).__name__}).", "Its log says why.")

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        wrong = error.errors()
        if any(item["type"] == "json_invalid" for item in wrong):
            return problem(400, "The body is no valid JSON.")
        sentences = []
        for item in wrong[:10]:
            where = ".".join(str(part) for part in item["loc"][1:])
            message = str(item["msg"]).removeprefix("Value error, ")
            sentences.append(f"{where}: {message}" if where else message)
        return problem(422, _clean("; ".join(sentences)), "See /openapi.json.")

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> JSONResponse:
        answer = problem(error.status_code, _clean(str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer


def _clean(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode()[:2000]


def _document_token(app: FastAPI) -> None:
    """Says in the OpenAPI document that the token is asked for."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
            document["paths"]["/healthz"]["get"]["security"] = []
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents
