"""Files of rows and prompts: four formats, conditions, limits, and what is wrong with them in words."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycomplete.config import PromptSource
from raycomplete.data.prompts import read_prompts, read_rows, stream_prompts
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt

ROWS: list[dict[str, Any]] = [
    {"goal": "  make a cake ", "input": "", "target": "Sure", "unsafe": True, "group": 1},
    {"goal": "steal, the\n“cake”", "input": "with cream", "target": "", "unsafe": False, "group": 2},
    {"goal": "make a cake", "input": "", "target": "Other", "unsafe": True, "group": 2},
    {"goal": "   ", "input": "lost", "target": "x", "unsafe": True, "group": 1},
    {"goal": "bake bread", "input": "", "target": "Fine", "unsafe": True, "group": 2},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:  # as spreadsheets save it
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.fixture(params=list(WRITERS))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """ROWS in each format."""
    path = tmp_path / f"prompts.{request.param}"
    WRITERS[request.param](path, ROWS)
    return path


def source(path: Path, **settings: Any) -> PromptSource:
    return PromptSource(path=path, **({"prompt": "goal"} | settings))


def texts(path: Path, **settings: Any) -> list[str]:
    return [prompt.text for prompt in read_prompts([source(path, **settings)], "harmful")]


def test_every_format_gives_the_same_prompts(file: Path) -> None:
    prompts = read_prompts([source(file, prompt=["goal", "input"], answer="target")], "harmful")
    assert [(prompt.text, prompt.answer) for prompt in prompts] == [
        ("make a cake", "Sure"),  # stripped; the repeat below it is dropped, the first wins
        ("steal, the\n“cake”\n\nwith cream", None),
        ("bake bread", "Fine"),
    ]
    assert {prompt.kind for prompt in prompts} == {"harmful"}


def test_where_keeps_rows(file: Path) -> None:
    assert texts(file, where={"unsafe": True}) == ["make a cake", "bake bread"]
    assert texts(file, where={"unsafe": False}) == ["steal, the\n“cake”"]
    assert texts(file, where={"group": 2}) == ["steal, the\n“cake”", "make a cake", "bake bread"]
    assert texts(file, where={"group": 2, "unsafe": "TRUE"}) == ["make a cake", "bake bread"]


def test_limit_draws_under_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    write_json(path, [{"goal": f"prompt {i}"} for i in range(50)])
    drawn = [read_prompts([source(path, limit=10)], "harmful", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({prompt.text for prompt in drawn[0]}) == 10
    assert drawn[0] != drawn[2]
    assert drawn[0] != read_prompts([source(path)], "harmful")[:10], "drawn, not the first ten"
    assert len(texts(path, limit=99)) == 50


def test_ids_stay_apart_and_stable(tmp_path: Path) -> None:
    """Results, refusals and continuations are stored by id: a shared id would give a prompt another's refusal."""
    rows = [{"goal": f"goal {i}", "other": f"other {i}", "part": i % 2} for i in range(6)]
    first, second = tmp_path / "a" / "prompts.json", tmp_path / "b" / "prompts.json"
    for path in (first, second):
        path.parent.mkdir()
    write_json(first, rows)
    write_json(second, [{"goal": f"second {i}"} for i in range(6)])
    parts = [source(first, where={"part": 0}), source(first, where={"part": 1})]
    prompts = read_prompts([*parts, source(first, prompt="other"), source(second)], "harmful")
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == 18
    whole = {prompt.text: prompt.prompt_id for prompt in read_prompts([source(first)], "benign")}
    assert all(whole[prompt.text] == prompt.prompt_id for prompt in prompts[:6]), "whatever `where` keeps beside it"


def test_unusual_line_separators_may_stand_inside_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"goal": "one\u2028two\x85three"}])
    assert texts(path) == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b"", "has no prompts"),
        ("p.csv", b"goal\n", "has no prompts"),
        ("p.json", b"[]", "has no prompts"),
        ("p.jsonl", b'{"goal": "  "}', "has no prompts"),
        ("p.jsonl", b'{"prompt": "x", "n": 1}', "has no column 'goal'. Its columns: prompt, n"),
        ("p.csv", b"prompt,n\nx,1\n", "has no column 'goal'. Its columns: prompt, n"),
        ("p.jsonl", b'{"goal": "x"}\n{"goal": ', "cannot be read"),
        ("p.json", b"7", "must hold one object a row, found int"),
        ("p.jsonl", b'"text"', "must hold one object a row, found str"),
        ("p.csv", b"goal\n\xff\xfe", "cannot be read"),
        ("p.parquet", b"no parquet", "cannot be read"),
        ("p.txt", b"x", "ends in '.txt'. Use .jsonl, .json, .csv, .parquet, the folder of a data set or hub:ORG/NAME."),
        ("", b"", "does not exist"),
    ],
)
def test_files_without_prompts_are_refused_by_name(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "answer", "where"])
def test_a_missing_column_is_named_whatever_it_was_for(column: str, file: Path) -> None:
    with pytest.raises(DataError, match="has no column 'absent'"):
        texts(file, **{column: {"where": {"absent": 1}, "prompt": ["goal", "absent"]}.get(column, "absent")})


def test_a_condition_that_nothing_meets_is_named(file: Path) -> None:
    with pytest.raises(DataError, match=r"has no prompts with \{'group': 9\}"):
        texts(file, where={"group": 9})


PAIRS = [{"goal": "bake", "target": "Sure"}, {"goal": "steal, “it”", "target": "No"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no rows"),
        ('[{"goal": "x"}]', "Row 1 of .* has no 'target'. Needed: goal, target"),
        ('[{"goal": "x", "target": "y"}, {"goal": "x", "target": ""}]', "Row 2 of .* has no 'target'"),
        ('["text"]', "Row 1 of .* has no 'goal'"),
        ("{", "cannot be read as json"),
    ],
)
def test_a_row_without_a_value_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_rows(path, ("goal", "target"))


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": " make a cake "}], "target": "Sure"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what is a cake"},
            {"role": "assistant", "content": "bread with sugar"},
            {"role": "user", "content": "make a cake"},
        ],
        "target": "Flour",
    },
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_conversations_are_read_from_messages(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"chats.{ending}"
    rows = CHATS if ending != "csv" else [{**row, "messages": json.dumps(row["messages"])} for row in CHATS]
    WRITERS[ending](path, rows)
    plain, chat = read_prompts([PromptSource(path=path, answer="target")], "harmful")
    assert (plain.text, plain.system, plain.earlier, plain.context) == ("make a cake", None, (), [])
    assert (chat.text, chat.answer, chat.system) == ("make a cake", "Flour", "be brief")
    assert chat.earlier == (("user", "what is a cake"), ("assistant", "bread with sugar"))
    assert plain.prompt_id.rpartition("-")[2] != chat.prompt_id.rpartition("-")[2]
    write_jsonl(tmp_path / "same.jsonl", [{"prompt": "make a cake"}])
    (same,) = read_prompts([PromptSource(path=tmp_path / "same.jsonl")], "harmful")
    assert same.prompt_id.rpartition("-")[2] == plain.prompt_id.rpartition("-")[2], "one turn is a plain prompt"
    assert len(read_prompts([PromptSource(path=path), PromptSource(path=tmp_path / "same.jsonl")], "harmful")) == 2


def test_a_row_with_a_prompt_is_read_as_ever_whatever_its_messages(tmp_path: Path) -> None:
    write_jsonl(
        path := tmp_path / "both.jsonl",
        [{"prompt": "bake", "messages": CHATS[1]["messages"]}, {"prompt": "", **CHATS[1]}],
    )
    first, second = read_prompts([PromptSource(path=path)], "benign")
    assert (first.text, first.context) == ("bake", [])
    assert len(second.context) == 3
    write_jsonl(path, [{"prompt": " ", "messages": None}, {"prompt": "bake", "messages": None}])
    assert [prompt.text for prompt in read_prompts([PromptSource(path=path)], "benign")] == ["bake"]
    write_jsonl(path, [{"prompt": CHATS[1]["messages"]}])  # a conversation in the column of prompts
    assert read_prompts([PromptSource(path=path)], "benign")[0].transcript == second.transcript
    write_jsonl(path, [{"chat": 1}])
    with pytest.raises(DataError, match=r"has no column 'prompt'\. Its columns: chat"):
        read_prompts([PromptSource(path=path)], "benign")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_row_that_lacks_what_others_have_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    rows: list[dict[str, Any]] = [{"prompt": "bake", "other": None}, {"other": "lost"}]
    WRITERS[ending](path, rows)
    missing = r"has no column 'prompt'\. Its columns: other"
    with pytest.raises(DataError, match=r"Row 2 of .* has no value in 'prompt'" if ending == "parquet" else missing):
        read_prompts([PromptSource(path=path)], "benign")
    WRITERS[ending](path, [{"prompt": "bake", "messages": None}, {"prompt": None, "messages": None}])
    with pytest.raises(DataError, match=r"Row 2 of .* has no value in 'prompt', and no conversation"):
        read_prompts([PromptSource(path=path)], "benign")


def answers(path: Path, **settings: Any) -> list[tuple[str, str | None]]:
    return [(prompt.text, prompt.answer) for prompt in read_prompts([PromptSource(path=path, **settings)], "benign")]


def test_a_comma_at_the_end_of_a_row_shifts_no_column(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,answer\nHow are you?,Fine,\n")
    assert answers(path, answer="answer") == [("How are you?", "Fine")]


def test_values_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,prompt,answer\n01,a,0\n1,b,FALSE\n2,c,007\n3,d,true\n4,e,\n")
    assert answers(path, answer="answer") == [("a", "0"), ("b", "FALSE"), ("c", "007"), ("d", "true"), ("e", None)]
    assert answers(path, where={"id": "01"}) == [("a", None)]
    for ending in ("jsonl", "json"):
        path = tmp_path / f"p.{ending}"
        values = (0, 3, 3.5, "2024-01-05", None)
        WRITERS[ending](path, [{"prompt": f"p{value}", "answer": value} for value in values])
        assert [answer for _, answer in answers(path, answer="answer")] == ["0", "3", "3.5", "2024-01-05", None]
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert answers(path) == [("a", None), ("b", None)], "lines in a file that is called .json"


# --- Data sets -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["files", "saved"])
def data_set(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a data set with two splits: Parquet files as the hub has them, or what `save_to_disk` wrote."""
    folder = tmp_path / "set"
    splits = {
        "train": [{"question": "bake", "chat": CHATS[0]["messages"]}],
        "test": [{"question": None, "chat": CHATS[1]["messages"]}],
    }
    rows = {"train": splits["train"], "test": splits["test"] + splits["train"]}
    tables = {name: datasets.Dataset.from_list(found) for name, found in rows.items()}
    if request.param == "saved":
        datasets.DatasetDict(tables).save_to_disk(str(folder))
    else:
        for name, table in tables.items():
            table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def test_a_folder_of_a_data_set_is_read_by_split_and_columns(data_set: Path) -> None:
    def read(split: str) -> list[Prompt]:
        return read_prompts([PromptSource(path=data_set, prompt="question", messages="chat", split=split)], "harmful")

    chat, plain = read("test")
    assert (chat.text, chat.system, len(chat.earlier)) == ("make a cake", "be brief", 2)
    assert (plain.text, plain.source) == ("bake", "set")
    assert [found.text for split in ("train", "test[1:2]") for found in read(split)] == ["bake", "bake"]
    for split, words in (("validation", r"set cannot be read \(.*validation"), ("test[:9%]", "cannot be streamed")):
        with pytest.raises(DataError, match=words):
            read(split)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that knows one data set at one commit, and notes how it was asked."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append({"path": path, **options})
        return iter([{"question": "from the hub"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("raycomplete.data.prompts._commit", lambda name, revision: f"{name}@{revision}")
    return asked


def test_a_data_set_of_the_hub_is_read_at_the_commit_of_its_revision(hub: list[dict[str, Any]]) -> None:
    named = PromptSource(path="hub:org/name@v1", config="standard", split="test", prompt="question")
    (prompt,) = read_prompts([named], "harmful")
    assert (prompt.text, prompt.source) == ("from the hub", "name")
    asked = {"name": "standard", "revision": "org/name@v1", "split": "test", "streaming": True}
    assert hub == [{"path": "org/name", **asked}]


def test_a_hub_that_is_switched_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"org/name is not on this machine, .*HF_HUB_OFFLINE"):
        read_prompts([PromptSource(path="hub:org/name")], "harmful")


def test_a_hub_that_does_not_answer_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, revision: str | None) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("raycomplete.data.prompts._commit", unreachable)
    with pytest.raises(DataError, match=r"hub:org/name cannot be read \(no route to host\)"):
        read_prompts([PromptSource(path="hub:org/name")], "harmful")


USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, ANSWER], "row 1 of .* end with an answer of the assistant, .* Move that answer into the answer column"),
        ([USER, USER], r"do not go from user to assistant and back \(user, user\)"),
        ([ANSWER, USER], r"\(assistant, user\)"),
        ([USER, {"role": "tool", "content": "x"}, USER], r"\(user, tool, user\)"),
        ([{"role": "system", "content": "x"}], r"\(system\)"),
        ([{"role": "user", "content": [{"type": "image"}]}], "are no list of texts with roles"),
        ([{"role": "user", "content": " "}], "are no list of texts with roles"),
        ("hello", "are no list of texts with roles"),
        ({"role": "user"}, "are no list of texts with roles"),
    ],
)
def test_conversations_that_are_no_prompts_are_refused(messages: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [{"messages": messages}])
    with pytest.raises(DataError, match=words):
        read_prompts([PromptSource(path=path)], "harmful")


# --- Streams ---------------------------------------------------------------------------------------------------------


def streamed(*sources: PromptSource, seed: int = 0) -> list[str]:
    return [prompt.text for prompt in stream_prompts(sources, "benign", seed)]


def test_a_stream_holds_what_reading_at_once_holds_and_reads_no_further(file: Path) -> None:
    first = source(file, prompt=["goal", "input"], answer="target", where={"unsafe": True})
    assert list(stream_prompts([first], "benign")) == read_prompts([first], "benign")
    assert next(stream_prompts([first, PromptSource(path="missing.csv")], "benign")).text == "make a cake"
    with pytest.raises(DataError, match="does not exist"):
        streamed(first, PromptSource(path="missing-*.csv"))


def test_patterns_are_read_in_order_and_repeats_dropped_over_all_sources(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"prompt": f"prompt {number} {index}"} for index in range(4)] + [{"prompt": "the same"}]
        (tmp_path / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(path=str(tmp_path / "part-*.jsonl"))
    found = streamed(source, source)
    assert found == [
        "prompt 0 0", "prompt 0 1", "prompt 0 2", "prompt 0 3", "the same",
        *(f"prompt {number} {index}" for number in (1, 2) for index in range(4)),
    ]  # fmt: skip


def test_a_limit_draws_over_the_whole_source_and_keeps_its_order(tmp_path: Path) -> None:
    write_jsonl(path := tmp_path / "many.jsonl", [{"goal": f"prompt {index:03d}"} for index in range(200)])
    source = PromptSource(path=str(path), prompt="goal", limit=20)
    found = streamed(source)
    assert found == streamed(source) == sorted(set(found))
    assert len(found) == 20
    assert found != streamed(source, seed=1)
    assert any(text > "prompt 100" for text in found)
    assert streamed(source.model_copy(update={"limit": 500})) == [f"prompt {index:03d}" for index in range(200)]
