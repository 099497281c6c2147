"""The gate before the application (who asks, from where, how much they send), the page's policy, and refusals."""

from __future__ import annotations

import base64
import hashlib
import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.serving.requests import ForbiddenError, is_bearer, is_loopback
from raycomplete.serving.schemas import Problem
from raycomplete.serving.store import KeyReusedError, QueueFullError

logger = logging.getLogger(__name__)

# The page holds no data, and a health check must work for those who may see none.
PUBLIC = frozenset({"/", "/healthz"})
MAX_BODY = 64 * 1024  # bytes
RETRY_AFTER_S = 5  # what a client waits where the queue is full or cannot be read
HEARTBEAT_S = 10.0  # longest silence of a stream: proxies close silent connections
_OPENAI = ("/v1/models", "/v1/chat/", "/v1/completions")
_FORWARDED = ("forwarded", "x-forwarded-for")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATUS = {ForbiddenError: 403, KeyReusedError: 409, QueueFullError: 429}
_SCRIPTS = ("client.js", "format.js", "charts.js", "views.js", "main.js")


def problem(
    scope: Scope, status: int, text: str, remedy: str = "", *, known: Iterable[str] | None = None
) -> JSONResponse:
    """Makes the answer that refuses a request, in the shape that clients of its path read."""
    if scope["path"].startswith(_OPENAI):
        code = "invalid_api_key" if status == 401 else None
        return openai_error(400 if status == 422 else status, f"{text} {remedy}".strip(), code=code)
    body = Problem(problem=_readable(text), remedy=_readable(remedy), known=None if known is None else list(known))
    return JSONResponse(body.model_dump(), status_code=status)


def openai_error(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    """Makes the answer that refuses a request under a route in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": _readable(message), "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def _readable(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode()[:2000]


@dataclass(frozen=True)
class Gate:
    """ASGI middleware around the whole application."""

    app: ASGIApp
    token_digest: str | None  # SHA-256 of the bearer token; without one, only this machine itself is served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["Content-Security-Policy"] = content_security_policy()
            await send(message)

        read: list[Message] = []  # the body, once it is read

        async def receive_again() -> Message:
            return read.pop() if read else await receive()

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            body = await _read_body(headers, receive)
            if body is None:
                refusal = problem(scope, 413, f"The body exceeds {MAX_BODY} bytes.", "Shorten it.")
                refusal.headers["Connection"] = "close"  # the rest of the body is not read
            read.append({"type": "http.request", "body": body, "more_body": False})
        await (refusal or self.app)(scope, receive_again, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if self.token_digest is None:
            client, host = scope.get("client"), headers.get("host", "")
            name = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]  # without its port
            # The Host header is compared too, or a web page could reach this server by pointing its own name at it.
            is_own = client is not None and is_loopback(client[0]) and is_loopback(name)
            if is_own and not any(name in headers for name in _FORWARDED):  # a proxy on this machine speaks for others
                return None
            words = "Without a token, this server serves its own machine only."
            return problem(scope, 403, words, "Start it with RAYCOMPLETE_TOKEN.")
        if scope["path"] in PUBLIC or is_bearer(headers.get("authorization"), self.token_digest):
            return None
        refusal = problem(scope, 401, "This needs the server's token.", "Send it as Authorization: Bearer TOKEN.")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """Reads the whole body; None where it exceeds the limit, whatever its Content-Length says."""
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > MAX_BODY:
        return None
    body, goes_on = bytearray(), True
    while goes_on:
        message = await receive()
        body += message.get("body", b"")
        goes_on = message.get("more_body", False)  # not where the client is gone
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def add_errors(app: FastAPI) -> None:
    """Gives every error one shape, which repeats nothing that the client sent beyond what the sentence needs."""

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> JSONResponse:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 422)
        answer = problem(request.scope, status, error.problem, error.remedy, known=getattr(error, "known", None))
        if status == 429:
            answer.headers["Retry-After"] = str(RETRY_AFTER_S)
        return answer

    @app.exception_handler(RaycompleteError)
    def failed(request: Request, error: RaycompleteError) -> JSONResponse:
        return problem(request.scope, 503, error.problem, error.remedy)

    @app.exception_handler(sqlite3.Error)
    def unreadable(request: Request, error: sqlite3.Error) -> JSONResponse:
        logger.error("The queue cannot be read or written: %s", error)
        words = "The queue cannot be read or written now."
        answer = problem(request.scope, 503, words, "Try again; the server's log says why.")
        answer.headers["Retry-After"] = str(RETRY_AFTER_S)
        return answer

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem(request.scope, 500, f"The server failed ({type(error).__name__}).", "Its log says why.")

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = error.errors()
        if any(item["type"] == "json_invalid" for item in wrong):
            return problem(request.scope, 400, "The body is no valid JSON.")
        sentences = []
        for item in wrong[:10]:
            place, message = ".".join(map(str, item["loc"][1:])), str(item["msg"]).removeprefix("Value error, ")
            sentences.append(f"{place}: {message}" if place else message)
        return problem(request.scope, 422, "; ".join(sentences), "See /openapi.json.")

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        answer = problem(request.scope, error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer


@cache
def page() -> str:
    """Returns the page: one document with its style and script inside, which its policy names by hash."""
    script, style = _parts()
    return _read("page.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)


@cache
def content_security_policy() -> str:
    """Returns the policy of every answer: only the page's own script and style run, and it talks to its own server."""
    script, style = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in _parts())
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _parts() -> tuple[str, str]:
    return '"use strict";\n' + "\n".join(map(_read, _SCRIPTS)), _read("page.css")


def _read(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")
