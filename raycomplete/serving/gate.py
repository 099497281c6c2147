"""What every request passes before the application sees it: who asks, from where, and how much they send."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycomplete.serving.schemas import Problem
from raycomplete.serving.token import is_bearer, is_loopback

# The page holds no data, and a health check must work for those who may see none.
PUBLIC = frozenset({"/", "/healthz"})
_FORWARDED = ("forwarded", "x-forwarded-for")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def problem(status: int, text: str, remedy: str = "", *, known: Iterable[str] | None = None) -> JSONResponse:
    """An error as JSON."""
    body = Problem(problem=text, remedy=remedy, known=None if known is None else list(known))
    return JSONResponse(body.model_dump(), status_code=status)


@dataclass(frozen=True)
class Gate:
    """ASGI middleware around the whole application.

    Attributes:
        app: The application.
        token_digest: SHA-256 of the bearer token. Without one, only this machine itself is served.
        max_body: Bytes.
        page_policy: Content-Security-Policy of every answer.
    """

    app: ASGIApp
    token_digest: str | None
    max_body: int
    page_policy: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["Content-Security-Policy"] = self.page_policy
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            body = await _read_body(headers, receive, self.max_body)
            if body is None:
                refusal = problem(
                    413, f"The body exceeds {self.max_body} bytes.", "Shorten it, or raise serve.max_body_kib."
                )
                refusal.headers["Connection"] = "close"  # the rest of the body is not read
            else:
                receive = _replayed(body, receive)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if self.token_digest is None:
            client = scope.get("client")
            # The Host header is compared too, or a web page could reach this server by pointing its own name at it.
            is_own = client is not None and is_loopback(client[0]) and is_loopback(_host_name(headers.get("host", "")))
            if is_own and not any(name in headers for name in _FORWARDED):  # a proxy on this machine speaks for others
                return None
            return problem(
                403, "Without a token, this server serves its own machine only.", "Start it with RAYCOMPLETE_TOKEN."
            )
        if scope["path"] in PUBLIC or is_bearer(headers.get("authorization"), self.token_digest):
            return None
        refusal = problem(401, "This needs the server's token.", "Send it as Authorization: Bearer TOKEN.")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


def _host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def _read_body(headers: Headers, receive: Receive, limit: int) -> bytes | None:
    """The whole body; None where it exceeds the limit, whatever its Content-Length says."""
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
