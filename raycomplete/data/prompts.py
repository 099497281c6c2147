"""Reads prompts from files, folders and the hub, and rows of users' other files.

The settings of attacks import this file. Rows are streamed, which leaves no copy of harmful prompts in a cache.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind, TurnRole

if TYPE_CHECKING:  # whose sections import attacks, and those this file
    from raycomplete.config.diagnosis import PromptSource

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put first
_SLICE = re.compile(r"(?P<name>.+?)\[(?P<first>\d*):(?P<stop>\d*)\]")  # of a split: its rows from first to before stop
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def load_rows(path: Path) -> list[Any]:
    """Reads all rows of a file, whose ending names the format; a row of a wrong kind is left to the caller."""
    if not path.is_file():
        raise DataError(f"The file {path} cannot be read: it does not exist.", "Paths are relative to the run file.")
    if path.suffix.lower() not in _ENDINGS:
        raise DataError(f"The file {path} ends in {path.suffix!r}.", "Use .jsonl, .json, .csv or .parquet.")
    try:
        return list(_file_rows(path))
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise DataError(f"The file {path} cannot be read as {path.suffix[1:]} ({error}).") from error


def _file_rows(path: Path) -> Iterator[Any]:
    """Yields the rows of a file, values as they are written: `datasets` would make numbers and dates of texts."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet as pq  # heavy

        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with path.open(newline="", encoding=_ENCODING) as stream:
        if ending == ".csv":
            yield from csv.DictReader(stream)
        elif ending == ".json" and (text := stream.read()).lstrip().startswith("["):
            yield from json.loads(text)
        else:  # a stream, unlike splitlines(), keeps U+2028 in a JSON string
            stream.seek(0)
            yield from (json.loads(line) for line in stream if line.strip())


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the rows of a file, at least one, and checks that each has a value in every column."""
    rows = load_rows(path)
    if not rows:
        raise DataError(f"The file {path} holds no rows.", "Name another file.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if not isinstance(row, dict) or row.get(column) in (None, "")]
        if missing:
            raise DataError(f"Row {number} of {path} has no {missing[0]!r}.", f"Needed: {', '.join(columns)}.")
    return rows


def read_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> list[Prompt]:
    """Reads all prompts of several sources, repeats dropped (same text after the same conversation, first wins)."""
    prompts: dict[str, Prompt] = {}
    for source in sources:
        found = list(_source_prompts(source, kind))
        if source.limit is not None and source.limit < len(found):
            found = random.Random(f"{seed}:{_place(source).name}").sample(found, source.limit)
        for prompt in found:
            prompts.setdefault(prompt.transcript, prompt)
    return list(prompts.values())


def stream_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> Iterator[Prompt]:
    """Yields the prompts of several sources, repeats dropped; of large inputs, 8 bytes a prompt are held."""
    seen: set[bytes] = set()
    for source in sources:
        for prompt in _limited(_source_prompts(source, kind), source, seed):
            digest = hashlib.blake2b(prompt.transcript.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                yield prompt


def content_key(prompts: Sequence[Prompt]) -> str:
    """Returns a hash that names the content of a batch: ids, texts, answers, and conversations."""
    content = json.dumps([[prompt.prompt_id, prompt.text, prompt.answer, *prompt.context] for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _limited(prompts: Iterator[Prompt], source: PromptSource, seed: int) -> Iterator[Prompt]:
    """Yields at most `limit` prompts, each with the same chance, in the order of the source (reservoir sampling)."""
    if source.limit is None:
        yield from prompts
        return
    draw = random.Random(f"{seed}:{source.path}")
    kept: list[tuple[int, Prompt]] = []
    for index, prompt in enumerate(prompts):
        if index < source.limit:
            kept.append((index, prompt))
        elif (place := draw.randrange(index + 1)) < source.limit:
            kept[place] = (index, prompt)
    yield from (prompt for _, prompt in sorted(kept, key=lambda item: item[0]))


def _source_prompts(source: PromptSource, kind: PromptKind) -> Iterator[Prompt]:
    """Yields the prompts of one source as they are read, at least one."""
    is_empty = True
    for prompt in _select_prompts(_rows(source), source, kind):
        is_empty = False
        yield prompt
    if is_empty:
        condition = f" with {source.where}" if source.where else ""
        raise DataError(f"The prompt source {source.path} has no prompts{condition}.", "Check its rows and conditions.")


def _place(source: PromptSource) -> Path:
    return Path(source.hub_id or source.path)


def _rows(source: PromptSource) -> Iterator[dict[str, Any]]:
    """Yields the rows of a source, or those that its split names by `train[10:20]`, which `datasets` cannot stream."""
    found = _SLICE.fullmatch(source.split)
    if found is None and "[" in source.split:
        raise DataError(f"The split {source.split!r} of {source.path} cannot be streamed.", "Write train[:100].")
    split = source.split if found is None else found["name"]
    bounds = [int(found[end]) if found and found[end] else None for end in ("first", "stop")]
    return islice(_all_rows(source, split), *bounds)


def _all_rows(source: PromptSource, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split; every error of a reader becomes one sentence."""
    folder = Path(source.path)
    try:
        if source.hub_id is None and not folder.is_dir():
            for file in _files(source):
                yield from _file_rows(file)
            return
        import datasets  # heavy

        options: dict[str, Any] = {"split": split, "streaming": True, "name": source.config}
        if source.hub_id is not None:
            commit = hub_commit(source)
            # Where the hub is switched off, what an earlier use has left in the cache is read.
            options |= {"revision": commit or source.revision, "streaming": commit is not None}
            yield from datasets.load_dataset(source.hub_id, **options)
        elif any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            whole = datasets.load_from_disk(str(folder))
            yield from whole[split] if isinstance(whole, datasets.DatasetDict) else whole
        else:
            yield from datasets.load_dataset(str(folder), **options)
    except DataError:
        raise
    except Exception as error:  # the readers raise classes of their own without a common root
        raise _unreadable(source, error) from error


def _files(source: PromptSource) -> list[Path]:
    """Lists the files of a pattern in order."""
    files = [source.path] if Path(source.path).is_file() else sorted(glob.glob(source.path, recursive=True))
    if not files:
        raise DataError(
            f"The prompt source {source.path} does not exist.", "Paths are relative to the run file; hub:ORG/NAME."
        )
    if (ending := Path(files[0]).suffix).lower() not in _ENDINGS:
        raise DataError(
            f"The prompt source {source.path} ends in {ending!r}.",
            "Use .jsonl, .json, .csv, .parquet, the folder of a data set or hub:ORG/NAME.",
        )
    return list(map(Path, files))


def hub_commit(source: PromptSource) -> str | None:
    """Returns the commit at which a source of the hub is read, asked once; None where the hub is switched off."""
    from huggingface_hub import constants

    if source.hub_id is None or constants.HF_HUB_OFFLINE:
        return None
    try:
        return _commit(source.hub_id, source.revision)
    except Exception as error:  # of httpx and the hub
        raise _unreadable(source, error) from error


@cache
def _commit(name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    return HfApi(library_name="raycomplete").dataset_info(name, revision=revision, timeout=30).sha


def _unreadable(source: PromptSource, error: Exception) -> DataError:
    from huggingface_hub import constants

    reason = " ".join(str(error.__cause__ or error).split())[:200]
    if source.hub_id is None:
        remedy = "Check its format: one object a row, the same kind of value in each column."
    elif constants.HF_HUB_OFFLINE:
        return DataError(
            f"The data set {source.hub_id} is not on this machine, and the hub is switched off (HF_HUB_OFFLINE).",
            "Read it once with the hub on, or name a local file or folder as path.",
        )
    else:
        remedy = "Check name, revision, config, split, token and network, or name a local file or folder as path."
    return DataError(f"The prompt source {source.path} cannot be read ({reason}).", remedy)


def _select_prompts(rows: Iterable[Any], source: PromptSource, kind: PromptKind) -> Iterator[Prompt]:
    """Yields the prompts of rows that meet `where`; rows with an empty text are left out."""
    path, (column, *more) = _place(source), source.prompt_columns
    others = [*more, *([source.answer] if source.answer else [])]
    for index, row in enumerate(rows):  # numbered before `where`, so that a number points into the file
        _require(row, list(source.where), path)
        # CSV knows no types, so `refusal_cue: true` must also match the text "true".
        if any(str(row[name]).strip().lower() != str(value).lower() for name, value in source.where.items()):
            continue
        asked, where = row.get(column), f"row {index + 1} of {path}"
        chat = asked if isinstance(asked, list) else row.get(source.messages)
        is_chat = isinstance(asked, list) or (asked in (None, "") and source.messages in row)
        _require(row, others if is_chat else [column, *others], path)
        # Readers of tables fill columns that a row lacks with None; an empty text is meant.
        if asked is None and chat is None:
            raise DataError(
                f"R{where[1:]} has no value in {column!r}, and no conversation.",
                "Give it one, name its column as `prompt` or `messages`, or leave the row out by `where`.",
            )
        system: str | None = None
        earlier: tuple[tuple[TurnRole, str], ...] = ()
        text = "" if is_chat else str(asked).strip()
        if is_chat and chat:
            system, earlier, text = _read_conversation(chat, where)
        if not text:
            continue
        full, answer = (
            "\n\n".join([text, *filter(None, (_text(row, name) for name in more))]),
            _text(row, source.answer),
        )
        prompt = Prompt("", full, kind, answer or None, path.stem, system=system, earlier=earlier)
        # The digest keeps ids apart where two files share a name, or two sources read other columns of one row.
        digest = hashlib.sha256(prompt.transcript.encode()).hexdigest()[:6]
        yield replace(prompt, prompt_id=f"{path.stem}-{index:05d}-{digest}")


def _text(row: dict[str, Any], name: str | None) -> str:
    return "" if not name or row.get(name) is None else str(row[name]).strip()


def _read_conversation(messages: Any, where: str) -> tuple[str | None, tuple[tuple[TurnRole, str], ...], str]:
    """Returns system prompt, earlier turns and last user message of a conversation."""
    with suppress(ValueError):
        messages = json.loads(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not all(
        isinstance(item, dict) and isinstance(item.get("content"), str) and item["content"].strip() for item in messages
    ):
        raise DataError(
            f"The messages in {where} are no list of texts with roles.",
            'Write: "messages": [{"role": "user", "content": "..."}].',
        )
    turns = [(item.get("role"), item["content"].strip()) for item in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if turns and turns[-1][0] == "assistant":
        raise DataError(
            f"The messages in {where} end with an answer of the assistant, and a prompt ends with the user.",
            "Move that answer into the answer column: the prefill attack gives its first tokens.",
        )
    if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        found = ", ".join(str(item.get("role")) for item in messages) or "none"
        raise DataError(
            f"The messages in {where} do not go from user to assistant and back ({found}).",
            "Begin with the user, after at most one system message, and end with the user.",
        )
    return system, tuple(turns[:-1]), turns[-1][1]


def _require(row: Any, names: Sequence[str], path: Path) -> None:
    if not isinstance(row, dict):
        raise DataError(f"The prompt file {path} must hold one object a row, found {type(row).__name__}.")
    if missing := [name for name in names if name not in row]:
        raise DataError(
            f"The prompt file {path} has no column {missing[0]!r}.", f"Its columns: {', '.join(map(str, row))}."
        )
