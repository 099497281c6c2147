"""The routes in OpenAI's shape: what clients of that interface send and read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from raycomplete.runtime.errors import WorkError
from raycomplete.serving.openai_api import ChatRequest
from tests.serving.conftest import Server

USER = {"role": "user", "content": "heat the flask"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def chat(make_server: Callable[..., Server]) -> Server:
    return make_server(chat=True)


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = server.client.post(path, json={"model": "aligned"} | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chunks(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = server.client.post(path, json={"model": "aligned", "stream": True} | body)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(server: Server, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    answer = server.client.post(path, json={"model": "aligned"} | body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return dict(answer.json()["error"])


def test_models_are_listed(chat: Server) -> None:
    listed = chat.client.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", ["base", "aligned"])
    assert chat.client.get("/v1/models/base").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == chat.config.models.max_length
    assert chat.client.get("/v1/models/student").json()["error"]["code"] == "model_not_found"


def test_the_routes_are_there_only_where_chat_is_on(make_server: Callable[..., Server]) -> None:
    server = make_server()
    assert server.client.post(CHAT, json={"model": "aligned", "messages": [USER]}).status_code == 404
    assert server.client.get("/v1/models").status_code == 404
    assert server.client.get("/v1/options").json()["chat"] == []


def test_a_chat_is_answered_in_openais_shape(chat: Server) -> None:
    body = ask(chat, CHAT, messages=[{"role": "system", "content": "you are a clerk ."}, USER], temperature=0)
    (choice,) = body["choices"]
    assert (body["object"], body["model"], choice["index"], choice["finish_reason"]) == (
        "chat.completion", "aligned", 0, "stop",
    )  # fmt: skip
    assert body["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant"
    tokens, sampling = chat.models["aligned"].model.asked[0]
    codec = chat.models["aligned"].model.codec
    assert list(tokens) == codec.encode_prompt("heat the flask", "you are a clerk ."), "as an evaluation asks"
    assert (sampling.temperature, sampling.max_tokens) == (0, 256)
    assert body["usage"] == {
        "prompt_tokens": len(tokens), "completion_tokens": 3, "total_tokens": len(tokens) + 3,
    }  # fmt: skip


def test_parts_of_a_message_and_unknown_keys_are_taken(chat: Server) -> None:
    parts = [{"type": "text", "text": "heat"}, {"type": "text", "text": "the flask"}]
    ask(chat, CHAT, messages=[{"role": "user", "content": parts}], user="me", metadata={"a": 1}, tools=None, stop=None)
    codec = chat.models["aligned"].model.codec
    assert list(chat.models["aligned"].model.asked[0][0]) == codec.encode_prompt("heat\nthe flask")


@pytest.mark.parametrize(
    "flags",
    [{"continue_final_message": True, "add_generation_prompt": False}, {"prefix": True}],
    ids=["vllm", "prefix"],
)
def test_a_prefilled_answer_is_continued(chat: Server, flags: dict[str, bool]) -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "sure , here is"}
    if "prefix" in flags:
        answer, flags = answer | flags, {}
    body = ask(chat, CHAT, messages=[USER, answer], **flags)
    codec = chat.models["aligned"].model.codec
    sequence = [*codec.encode_prompt("heat the flask"), *codec.encode_answer("sure , here is")]
    assert list(chat.models["aligned"].model.asked[0][0]) == sequence
    assert body["choices"][0]["message"]["content"] == " is here ,", "the prefill itself is not repeated"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "The last message is the assistant's"),
        ({"messages": [USER], "continue_final_message": True}, "needs add_generation_prompt: false"),
        (
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False},
            "needs a last message of the assistant",
        ),
        ({"messages": [USER], "add_generation_prompt": False}, "needs a last message of the assistant"),
        ({"messages": [USER, USER]}, "roles must alternate"),
        ({"messages": []}, "messages: "),
        ({"messages": [USER | {"role": "tool"}]}, "messages.0.role"),
        ({"messages": [USER], "temperature": 3}, "temperature: "),
        ({"messages": [USER], "n": 0}, "n: "),
        ({"messages": [USER], "max_tokens": "many"}, "max_tokens: "),
        ({"messages": [USER], "top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools is not supported"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format other than text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_done_is_400_and_named(chat: Server, body: dict[str, Any], words: str) -> None:
    raw = json.dumps({"model": "aligned"} | body)
    answer = chat.client.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert chat.models["aligned"].model.asked == []


def test_errors_have_openais_shape_here_and_our_own_elsewhere(make_server: Callable[..., Server]) -> None:
    server = make_server(chat=True)
    assert refused(server, CHAT, 404, model="gpt", messages=[USER]) == {
        "message": "The model 'gpt' does not exist. This server has base, aligned.",
        "type": "invalid_request_error",
        "param": None,
        "code": "model_not_found",
    }
    assert refused(server, CHAT, 413, messages=[USER | {"content": "x" * 100_000}])["message"].startswith("The body")
    bare = TestClient(server.app, base_url="http://127.0.0.1")
    answer = bare.post(TEXT, json={"model": "aligned", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert bare.get("/v1/evaluations").json()["problem"] == "This needs the server's token."
    broken = server.client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert broken.json()["error"]["message"] == "The body is no valid JSON."


def test_a_request_beyond_the_context_is_told_so_and_a_long_answer_is_cut(chat: Server) -> None:
    longest = chat.config.models.max_length
    error = refused(chat, TEXT, prompt=[7] * longest)
    assert (error["code"], str(longest) in error["message"]) == ("context_length_exceeded", True)
    for wrong in ({"prompt": [10**6]}, {"prompt": "heat", "max_tokens": 0}, {"prompt": ["a"] * 100, "n": 2}):
        refused(chat, TEXT, **wrong)
    (choice,) = ask(chat, TEXT, prompt=[7] * (longest - 2), max_tokens=500)["choices"]
    assert (len(choice["text"].split()), choice["finish_reason"]) == (2, "length")


def test_texts_and_token_ids_are_continued_as_they_are(chat: Server) -> None:
    codec = chat.models["aligned"].model.codec
    ids = codec.encode_answer("heat the flask")
    texts = [choice["text"] for choice in ask(chat, TEXT, prompt=[ids, ids[:2]], n=2, seed=5)["choices"]]
    assert texts == [" flask the heat"] * 2 + [" the heat"] * 2
    assert [(list(tokens), sampling.seed) for tokens, sampling in chat.models["aligned"].model.asked] == [
        (ids, 5), (ids, 6), (ids[:2], 5), (ids[:2], 6),
    ]  # fmt: skip
    assert ask(chat, TEXT, prompt="heat the flask")["choices"][0]["text"] == " flask the heat"
    assert ask(chat, TEXT, prompt=["heat the flask"], stop=["the"])["choices"][0]["text"] == " flask"


def test_prompt_logprobs_come_as_lm_eval_reads_them(chat: Server) -> None:
    codec = chat.models["aligned"].model.codec
    ids = codec.encode_answer("heat the flask")
    body = ask(chat, TEXT, prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["heat", "the", "flask", "flask"]
    assert found["token_logprobs"] == [None, -1.0, -1.0, -1.0], "its clients take [context:-1]"
    assert found["top_logprobs"][:2] == [None, {"the": -1.0}]
    assert found["text_offset"] == [0, 4, 7, 12]
    assert body["choices"][0]["text"] == "heat the flask flask"
    reading = ask(chat, TEXT, prompt=ids, echo=True, max_tokens=0, logprobs=0)
    assert reading["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert reading["choices"][0]["text"] == "heat the flask"
    assert reading["usage"]["completion_tokens"] == 0


def test_logprobs_of_a_chat_name_rivals(chat: Server) -> None:
    body = ask(chat, CHAT, messages=[USER], logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert [item["token"] for item in content[0]["top_logprobs"]] == [content[0]["token"], "rival"]
    assert bytes(content[0]["top_logprobs"][1]["bytes"]) == b"rival"
    assert ask(chat, CHAT, messages=[USER])["choices"][0]["logprobs"] is None


def test_a_stream_says_what_the_whole_answer_says(chat: Server) -> None:
    asked: dict[str, Any] = {"messages": [USER], "n": 2, "stream_options": {"include_usage": True}, "logprobs": True}
    whole, streamed = ask(chat, CHAT, **asked), chunks(chat, CHAT, **asked)
    assert {chunk["object"] for chunk in streamed} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in streamed}) == 1
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for index in (0, 1):
        own = [choice for chunk in streamed for choice in chunk["choices"] if choice["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        assert sum(len(choice["logprobs"]["content"]) for choice in own if choice["logprobs"]) == 3
    assert (streamed[-1]["choices"], streamed[-1]["usage"]) == ([], whole["usage"])
    texts = chunks(chat, TEXT, prompt="heat the flask", echo=True, logprobs=1)
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == "heat the flask flask the heat"
    offsets = [at for chunk in texts for at in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)


def test_a_stream_is_refused_with_a_status(chat: Server) -> None:
    assert refused(chat, CHAT, messages=[USER, USER], stream=True)["type"] == "invalid_request_error"
    assert refused(chat, CHAT, 404, model="gpt", messages=[USER], stream=True)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_or_is_silent_is_503(chat: Server, stream: bool) -> None:
    class Broken:
        pause_s = 0.0

        async def generate(self, *_: Any) -> Any:
            await asyncio.sleep(self.pause_s)
            if self.pause_s < 1:
                raise WorkError("The engine died.", "Ask again.")
            yield

    model = chat.models["aligned"]
    broken: Any = Broken()
    model._model = broken
    body: dict[str, Any] = {"prompt": "heat", "stream": stream}
    assert refused(chat, TEXT, 503, **body)["message"] == "The engine died. Ask again."
    model._timeout_s, broken.pause_s = 0.2, 30.0
    assert "0.2 s" in refused(chat, TEXT, 503, **body)["message"]


def test_nothing_is_generated_for_a_client_that_left(chat: Server) -> None:
    chat.models["aligned"].model.pause_s = 5.0

    async def leave() -> int:
        request = ChatRequest.model_validate({"model": "aligned", "messages": [USER], "stream": True})
        stream = chat.models["aligned"].answer(request)
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        assert chat.models["aligned"].model.open == 1
        reading.cancel()
        await asyncio.wait([reading])
        return chat.models["aligned"].model.open

    assert asyncio.run(leave()) == 0
