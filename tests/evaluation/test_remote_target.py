"""Targets behind an address: how they are asked, what is repeated, what is refused, and that keys stay secret."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.attack import continued
from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.rewriting import PairConfig
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.commands.diagnose import diagnose
from raycomplete.commands.evaluate import evaluate
from raycomplete.config import EvaluationConfig, RemoteConfig, RunConfig, parse
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import prepare_models, prepare_prompts
from raycomplete.data.remote import RememberingCodec, RemoteSpec
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.run import Run
from raycomplete.evaluation import remote_target
from raycomplete.evaluation.attack_resources import AttackResources, check_evaluation, extra_engines
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.remote_target import RemoteModel, open_remote, usage_line
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, DataError, RefusedError, SetupError, WorkError
from raycomplete.runtime.logs import hide_secrets
from raycomplete.runtime.types import Prompt
from tests.evaluation.chats import FLAGS, Chats

KEY = "sk-a-key-for-these-tests"


@pytest.fixture
def server() -> Iterator[Chats]:
    found = Chats()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def codec() -> RememberingCodec:
    return RememberingCodec(ChatCodec(resolve_checkpoint("organism:aligned", role="aligned")))


@pytest.fixture
def make(server: Chats, codec: RememberingCodec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RemoteModel]:
    def made(retries: int = 6, **settings: Any) -> RemoteModel:
        monkeypatch.setattr(remote_target, "RETRIES", retries)
        return RemoteModel(server.spec, RemoteConfig(**settings), codec)

    return made


def config_of(server: Chats, tmp_path: Path, **evaluation: Any) -> RunConfig:
    models = {"base": "organism:base", "aligned": "organism:aligned", "student": f"openai:{server.spec.address}#them"}
    tree = {
        "models": models | {"dtype": "float32", "max_length": 256},
        "data": {"source": "organism"},
        "rollout": {"max_anchor_tokens": 64, "max_refusal_tokens": 28, "max_harmful_tokens": 64},
        "method": {"depth": {"max": 64}},
        "evaluation": {"num_prompts": 2, "depths": [0, 4], "max_tokens": 16, "max_utility_tokens": 16, **evaluation},
        "output": {"root": str(tmp_path / "runs"), "name": "r"},
    }
    return parse(tree, "test")


def test_a_sequence_becomes_messages_again(codec: RememberingCodec) -> None:
    prompt = Prompt(
        "p", "heat it", "harmful", system="you are a clerk .", earlier=(("user", "one"), ("assistant", "two"))
    )
    ids = prompt.encoded(codec.with_thinking(False))
    messages, answer = codec.messages([*ids, *codec.encode_answer("sure , here is")])
    assert [item["role"] for item in messages] == ["system", "user", "assistant", "user"]
    assert (messages[-1]["content"], answer) == ("heat it", "sure , here is")
    assert codec.messages(codec.encode_prompts(["one flask", "two"])[0]) == (
        [{"role": "user", "content": "one flask"}],
        "",
    )
    with pytest.raises(WorkError, match="An attack asks in token ids"):
        codec.messages([1, 2, 3])


def test_prompts_and_begun_answers_are_asked_and_counted(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    model = make(parallel=1)
    prompt = codec.encode_prompt("heat the flask")
    begun = [*prompt, *codec.encode_answer("gather three leaves")]
    said = model.generate([prompt, begun], max_tokens=2, temperature=0.7, top_p=0.9, top_k=5, seed=3)
    assert [codec.decode(tokens) for tokens in said] == ["flask the", "leaves three"], "cut at max_tokens"
    first, last = server.asked[0], server.asked[-1]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("them", 2, 0.7)
    assert (first["top_p"], first["top_k"], first["seed"], last["seed"]) == (0.9, 5, 3, 4)
    assert not any(flag in first for flag in FLAGS)
    assert last["messages"][-1] == {"role": "assistant", "content": "gather three leaves"}
    assert [last[flag] for flag in FLAGS] == [True, False]
    assert len(server.asked) == 4, "two of them asked once whether it continues answers; one was refused"
    model.generate([begun], max_tokens=2)
    assert (len(server.asked), server.asked[-1]["temperature"]) == (5, 0.0)
    assert not {"seed", "top_p", "top_k"} & server.asked[-1].keys(), "greedy"
    counts = {"requests": 4, "retries": 0, "prompt_tokens": 40, "completion_tokens": 8, "filtered": 0}
    assert model.usage.counts == counts
    assert "4 times" in usage_line("student", counts)


def test_a_server_that_ignores_the_flags_continues_nothing(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    server.knows_flags = False
    begun = [*codec.encode_prompt("heat the flask"), *codec.encode_answer("gather")]
    with pytest.raises(SetupError, match="does not continue an answer that is begun for it"):
        make().generate([begun], max_tokens=2)
    make(prefill="prefix").generate([begun], max_tokens=2)
    assert server.asked[-1]["messages"][-1] == {"role": "assistant", "content": "gather", "prefix": True}
    make(prefill="assistant").generate([begun], max_tokens=2)
    assert server.asked[-1]["messages"][-1] == {"role": "assistant", "content": "gather"}
    assert "continue_final_message" not in server.asked[-1]


def test_a_beginning_that_a_server_repeats_is_not_its_models(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    server.echoes = True
    begun = [*codec.encode_prompt("heat the flask"), *codec.encode_answer("gather the flask")]
    assert codec.decode(make(prefill="prefix").generate([begun], max_tokens=3)[0]) == "flask the gather"


def test_what_is_busy_is_asked_again_and_what_refuses_is_not(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    prompt = codec.encode_prompt("heat the flask")
    model = make(retries=3)
    server.statuses = [429, 503, 500]
    assert codec.decode(model.generate([prompt], max_tokens=9)[0]) == "flask the heat"
    assert (len(server.asked), model.usage.counts["retries"]) == (4, 3)
    server.statuses = [500] * 4
    with pytest.raises(WorkError, match=r"was busy or failed in 4 attempts \(last: status 500\)"):
        model.generate([prompt], max_tokens=9)
    for status, remedy in ((401, "Check the key"), (404, "Check address, name")):
        asked = len(server.asked)
        server.statuses = [status]
        with pytest.raises(SetupError, match=f"refuses the request .status {status}.") as caught:
            model.generate([prompt], max_tokens=9)
        assert remedy in caught.value.remedy
        assert len(server.asked) == asked + 1


def test_what_was_answered_is_not_asked_again(
    server: Chats, codec: RememberingCodec, make: Callable[..., RemoteModel], tmp_path: Path
) -> None:
    """Trials are stored many at a time: an error near the end must not cost the answers before it."""
    prompts = codec.encode_prompts([f"heat {word}" for word in ("salt", "the flask", "it", "one")])
    model = make(parallel=1, retries=0)
    model.keep_in(tmp_path / "kept.jsonl")
    server.statuses = [200, 200, 500]
    with pytest.raises(WorkError):
        model.generate(prompts, max_tokens=9)
    again = make(parallel=1)
    again.keep_in(tmp_path / "kept.jsonl")
    asked = len(server.asked)
    assert again.generate(prompts, max_tokens=9) == make().generate(prompts, max_tokens=9)
    assert len(server.asked) - asked == 2 + 4
    for _ in range(2):  # sampled: those without a seed are other answers each time
        again.generate(prompts[:1], max_tokens=9, temperature=1.0)
    assert len(server.asked) - asked == 8
    third = make()
    third.keep_in(tmp_path / "kept.jsonl")
    assert third.usage.counts == again.usage.counts, "what earlier starts asked was paid for too"
    counts = {"requests": 2 + 2 + 2, "retries": 0, "prompt_tokens": 60, "completion_tokens": 12, "filtered": 0}
    assert third.usage.counts == counts


def test_the_server_says_whether_an_answer_was_cut(
    server: Chats, codec: RememberingCodec, make: Callable[..., RemoteModel], tmp_path: Path
) -> None:
    """Its tokens are words here, of which a full stop is a part; to the local tokenizer it is a token of its own."""
    attack = build_attack(EvaluationConfig(depths=[0]).prefill())
    ids = codec.encode_prompts(["heat. flask.", "heat the flask"])
    trials = [Trial("a", "v", Prompt("p", "", "harmful"), tuple(sequence), Decoding(2)) for sequence in ids]
    for _ in range(2):  # asked, and kept
        model = make()
        model.keep_in(tmp_path / "kept.jsonl")
        responses = continued(Target("student", "m", model, codec, RefusalJudge(), 256, 2), trials)
        assert [codec.decode(response.tokens) for response in responses] == ["flask . heat .", "flask the"]
        assert [attack.is_cut(trial, response) for trial, response in zip(trials, responses, strict=True)] == [
            False,
            True,
        ]
    assert len(server.asked) == 2


def test_what_a_server_filters_is_refused(
    server: Chats, codec: RememberingCodec, make: Callable[..., RemoteModel], tmp_path: Path
) -> None:
    """The evaluated model is what is behind the address, and a harmless prompt that it keeps out is over-refusal."""
    server.filters = True
    prompts = [Prompt(kind, f"heat {word}", kind) for kind, word in (("harmful", "it"), ("borderline", "salt"))]  # type: ignore[arg-type]
    sets = EvaluationSets((prompts[0],), (), (prompts[1],))
    config = EvaluationConfig(depths=[0])
    for _ in range(2):  # asked, and kept
        target = Target("student", "m", make(), codec, RefusalJudge(), 512, config.max_tokens)
        result = evaluate_model(target, sets, config, tmp_path)
        assert result["over_refusal"]["rate"] == 1.0
        assert result["variants"]["prefill-0"]["outcomes"]["refused"] == 1
    assert len(server.asked) == 2


def test_a_failure_ends_what_else_is_at_work(server: Chats, make: Callable[..., RemoteModel]) -> None:
    model = make(parallel=4, retries=0, requests_per_minute=60)
    prompts = [make()._codec.encode_prompt(f"heat {word}") for word in ("salt", "the flask", "it", "one")]
    server.statuses = [401]
    started = time.monotonic()
    with pytest.raises(SetupError):
        model.generate(prompts, max_tokens=9)
    assert time.monotonic() - started < 2.5, "the others wait for their turn in the minute"
    assert len(server.asked) <= 2
    assert model.generate(prompts[:1], max_tokens=9)


def test_prompts_that_the_local_tokenizer_cannot_tell_apart_are_refused(codec: RememberingCodec) -> None:
    first = codec.encode_prompt("hello 1 there")
    assert codec.encode_prompt(" hello 1 there ") == first
    with pytest.raises(DataError, match="cannot be told"):
        codec.encode_prompt("hello 2 there")


def test_settings_of_the_environment_go_to_no_other_address(
    server: Chats, codec: RememberingCodec, make: Callable[..., RemoteModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "an-org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "a-project")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-another")
    model = make()
    assert model.generate([codec.encode_prompt("heat the flask")], max_tokens=9)
    assert server.keys == ["Bearer none"]
    sent = {name for name, value in model._client.default_headers.items() if isinstance(value, str)}
    assert not {"OpenAI-Organization", "OpenAI-Project"} & sent


def test_waits_end_with_a_sentence(server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec) -> None:
    prompt = codec.encode_prompt("heat the flask")
    server.pause_s = 1.0
    with pytest.raises(WorkError, match=r"did not answer within 0\.2 s, in 1 attempts"):
        make(retries=0, timeout_s=0.2).generate([prompt], max_tokens=1)
    nobody = RemoteSpec("http://127.0.0.1:9/v1", "them")
    with pytest.raises(WorkError, match="cannot be reached, in 1 attempts"):
        RemoteModel(nobody, RemoteConfig(), codec).generate([prompt], max_tokens=1)


def test_requests_are_bounded_side_by_side_and_a_minute(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    prompt = codec.encode_prompt("heat the flask")
    server.pause_s = 0.1
    make(parallel=3).generate([prompt] * 9, max_tokens=1)
    assert 1 < server.most_at_work <= 3
    server.pause_s, started = 0.0, time.monotonic()
    make(parallel=8, requests_per_minute=600).generate([prompt] * 5, max_tokens=1)
    assert time.monotonic() - started >= 0.39, "five starts, a tenth of a second apart"


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match="THEIR_KEY holds no key"):
        make(key_variable="THEIR_KEY")
    monkeypatch.setenv("THEIR_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(SetupError, match="holds what no header can"):
        make(key_variable="THEIR_KEY")
    monkeypatch.setenv("THEIR_KEY", KEY)
    model = make(key_variable="THEIR_KEY", retries=0)
    model.generate([codec.encode_prompt("heat")], max_tokens=1)
    assert server.keys[0] == f"Bearer {KEY}"
    server.statuses = [403]
    with pytest.raises(SetupError) as caught:  # whose server repeats the key in its answer
        model.generate([codec.encode_prompt("heat")], max_tokens=1)
    assert KEY not in str(caught.value)
    chain = "".join(traceback.format_exception(caught.value))
    assert KEY in chain, "the server's own words stand in the chain of errors, which a log of the run may hold"
    assert KEY not in hide_secrets(chain)


def test_a_server_is_told_the_length_by_the_name_that_it_takes(
    server: Chats, make: Callable[..., RemoteModel], codec: RememberingCodec
) -> None:
    server.length_key = "max_completion_tokens"
    make(parallel=2).generate([codec.encode_prompt(f"heat {word}") for word in ("it", "salt", "one")], max_tokens=7)
    assert server.asked[-1]["max_completion_tokens"] == 7
    assert "max_tokens" not in server.asked[-1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("openai:http://127.0.0.1/v1", "names no model behind an address"),
        ("openai:ftp://127.0.0.1/v1#m", "names no model behind an address"),
        ("openai:http://me:secret@127.0.0.1/v1#m", "must hold no key"),
        ("openai:http://127.0.0.1/v1?key=secret#m", "must hold no key"),
    ],
)
def test_wrong_addresses_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        RemoteSpec.parse(spec, setting="models.student")
    assert "secret" not in str(caught.value)


def test_an_attacker_behind_an_address_writes_words_that_no_local_tokenizer_knows(
    server: Chats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"openai:{server.spec.address}#them"
    monkeypatch.setattr(PairConfig, "instruction", "{goal} Größe")
    writing: dict[str, Any] = {"name": "pair", "attacker": address}
    asking = config_of(server, tmp_path, remote={"key_variable": "A_KEY", "parallel": 8}, attacks=[writing])
    with pytest.raises(SetupError, match="A_KEY holds no key"):
        check_evaluation(asking)
    monkeypatch.setenv("A_KEY", KEY)
    server.statuses = [404]
    with pytest.raises(SetupError, match="status 404"):
        check_evaluation(asking)
    check_evaluation(asking)
    assert {"seed", "top_p"} <= set(server.asked[-1]), "it is tried as the attack will ask"
    with pytest.raises(ConfigError, match=r"different hosts \(127.0.0.1, elsewhere\)"):
        check_evaluation(
            config_of(
                server,
                tmp_path,
                remote={"key_variable": "A_KEY"},
                attacks=[writing | {"attacker": "openai:http://elsewhere/v1#them"}],
            )
        )
    server.asked.clear()
    with pytest.raises(ConfigError, match=r"evaluation\.attacks\.attacker names no model"):
        check_evaluation(config_of(server, tmp_path, attacks=[writing | {"attacker": "openai:them"}]))
    assert extra_engines(asking) == 0, "it takes no place on this machine"

    models = prepare_models(asking, remote=True)
    prompts = prepare_prompts(asking, models.codec)
    run = Run(asking, tmp_path, models, prompts, Console(quiet=True), Cluster(use_gpu=False))
    attack: Any = build_attack(asking.evaluation.attacks[-1])
    goals = [f"«what» {number}" for number in range(40)]
    asked = [Prompt(goal, goal, "harmful") for goal in goals]
    trials = [Trial("pair", "pair", prompt, (), Decoding(8), position=place) for place, prompt in enumerate(asked)]
    for _ in range(2):
        with ExitStack() as ended:
            attacker = AttackResources(run, ended).tools(None).attacker(address)  # type: ignore[misc]
            requests = [attack.request(attacker, iter([{"goal": goal}])) for goal in goals]
            requests[7] = []  # a trial that is over
            written = attack.written(attacker, trials, requests, 0)
            assert written == [f"Größe {number} «what»" if number != 7 else "" for number in range(40)]
        fillings = iter([{"goal": "long " * 6000}, {"goal": "short"}])
        assert attacker.codec.decode(attack.request(attacker, fillings)) == "short Größe", "8192 tokens of 3 characters"
    assert len({body["seed"] for body in server.asked}) == len(server.asked) == 39, "what it wrote is kept"
    assert run.remote_usage[f"attacker them at {server.spec.address}"]["requests"] == 39, "of both starts"
    assert {body["max_tokens"] for body in server.asked} == {200}
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_what_needs_weights_is_refused_before_anything_starts(server: Chats, tmp_path: Path) -> None:
    config = config_of(server, tmp_path, attacks=["gcg"])
    with pytest.raises(ConfigError, match=r"The attack gcg needs the weights of models\.student"):
        evaluate(config)
    with pytest.raises(ConfigError, match=r"models\.student is behind an address"):
        diagnose(config)
    with pytest.raises(ConfigError, match=r"models\.student is behind an address"):
        prepare_models(config)
    remote_only = config.model_copy(update={"models": config.models.model_copy(update={"base": config.models.student})})
    with pytest.raises(ConfigError, match="Every model is behind an address"):
        prepare_models(remote_only, roles=("base", "student"), remote=True)
    server.knows_flags = False
    with pytest.raises(RefusedError, match="does not continue an answer"):
        evaluate(config_of(server, tmp_path, attacks=["templates"]))
    assert not (tmp_path / "runs").exists()
    plain = config_of(server, tmp_path, attacks=["templates"], depths=[0])
    models = prepare_models(plain, remote=True)
    assert set(open_remote(plain, models.remote, models.codec)) == {"student"}
    assert set(models.paths) == {"base", "aligned"}
