"""A server of the OpenAI kind that answers chats."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raycomplete.data.remote import RemoteSpec

FLAGS = ("continue_final_message", "add_generation_prompt")


class Chats(ThreadingHTTPServer):
    """A server that answers chats: it repeats the last message's words backwards, as many of them as it may.

    `statuses` are given before the first answers. `knows_flags`: as vLLM does; else it ignores what it does not know.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.statuses: list[int] = []
        self.knows_flags, self.pause_s = True, 0.0
        self.filters = False
        self.length_key = "max_tokens"
        self.says: Callable[[str], str] | None = None  # to a question, in place of its words backwards
        self.echoes = False  # the beginning of an answer stands before what is added, as with some hosted services
        self.at_work, self.most_at_work = 0, 0
        self.lock = threading.Lock()

    @property
    def spec(self) -> RemoteSpec:
        return RemoteSpec(f"http://127.0.0.1:{self.server_address[1]}/v1", "them")


class _Handler(BaseHTTPRequestHandler):
    server: Chats

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.keys.append(self.headers.get("Authorization", ""))
            status = server.statuses.pop(0) if server.statuses else 200
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        time.sleep(server.pause_s)
        with server.lock:
            server.at_work -= 1
        if server.knows_flags and all(body.get(flag) for flag in FLAGS):
            status = 400
        words = str(body["messages"][-1]["content"]).split()[::-1]
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or len(words)
        said = " ".join(words[:limit])
        ended = "length" if len(words) > limit else "stop"
        if server.says is not None:
            said = server.says(str(body["messages"][-1]["content"]))
        if server.echoes:
            said = f"{body['messages'][-1]['content']} {said}"
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": ended}
        answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "them"}
        answer |= {"choices": [choice], "usage": usage}
        message = f"no, {self.headers['Authorization']}"
        if server.filters:
            status = 400
        if server.length_key not in body:
            status, message = 400, f"Use {server.length_key} instead."
        if status != 200:
            code = "content_filter" if server.filters else None
            answer = {"error": {"message": message, "type": "t", "code": code}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After-Ms", "20")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...
