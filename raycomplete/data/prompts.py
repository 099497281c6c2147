"""Reads prompts from files, folders and the hub, by `datasets` where they are not JSON, and rows of users' other files.

The settings of attacks import this file. `datasets` streams: it leaves no copy of harmful prompts in a cache.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import random
import re
from collections import Counter
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
    from raycomplete.config.diagnosis import PromptColumns, PromptSource

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put first
_SLICE = re.compile(r"(?P<name>.+?)\[(?P<first>\d*):(?P<stop>\d*)\]")  # of a split: its rows from first to before stop
_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(path: Path) -> list[Any]:
    """Reads all rows of a file, whose ending names the format; a row of a wrong kind is left to the caller."""
    if not path.is_file():
        raise DataError(f"The file {path} cannot be read: it does not exist.", "Paths are relative to the run file.")
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                return list(_json_rows(path))
            case ".json":
                return list(json.loads(path.read_text(_ENCODING)))
            case ".csv":
                with path.open(newline="", encoding=_ENCODING) as stream:
                    return list(csv.DictReader(stream))
            case ".parquet":
                import pyarrow.parquet as pq  # heavy

                return list(pq.read_table(path).to_pylist())
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise DataError(f"The file {path} cannot be read as {path.suffix[1:]} ({error}).") from error
    raise DataError(f"The file {path} ends in {path.suffix!r}.", "Use .jsonl, .json, .csv or .parquet.")


def _json_rows(path: Path) -> Iterator[Any]:
    """Yields the values of JSON lines, or of one list; `datasets` would make numbers and dates of a column alike."""
    with path.open(encoding=_ENCODING) as stream:  # a file, unlike splitlines(), keeps U+2028 in a JSON string
        if path.suffix.lower() == ".json":
            text = stream.read()
            if text.lstrip().startswith("["):
                yield from json.loads(text)
                return
            stream.seek(0)
        for line in stream:
            if line.strip():
                yield json.loads(line)


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


def read_prompts(
    sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0, too_long: Counter[str] | None = None
) -> list[Prompt]:
    """Reads all prompts of several sources, repeats dropped (same text after the same conversation, first wins)."""
    prompts: dict[str, Prompt] = {}
    for source in sources:
        found = list(source_prompts(source, kind, too_long))
        if source.limit is not None and source.limit < len(found):
            found = random.Random(f"{seed}:{_place(source).name}").sample(found, source.limit)
        for prompt in found:
            prompts.setdefault(prompt.transcript, prompt)
    return list(prompts.values())


def source_prompts(source: PromptSource, kind: PromptKind, too_long: Counter[str] | None = None) -> Iterator[Prompt]:
    """Yields the prompts of one source as they are read, and counts the rows that are too long."""
    found, longest = False, source.max_characters
    for prompt in select_prompts(_rows(source), source, _place(source), kind):
        if longest is not None and len(prompt.transcript) > longest:
            if too_long is not None:
                too_long[source.path] += 1
            continue
        found = True
        yield prompt
    if not found:
        condition = f" with {source.where}" if source.where else ""
        if longest is not None:
            condition += f" of at most {longest} characters"
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
    """Yields the rows of a split; every error of `datasets` becomes one sentence."""
    import datasets  # heavy

    options: dict[str, Any] = {"split": split, "streaming": True}
    try:
        if source.hub_id is not None:
            revision = hub_commit(source)
            # Where the hub is switched off, what an earlier use has left in the cache is read.
            options["streaming"] = revision is not None
            named = {"name": source.config, "revision": revision or source.revision}
            yield from datasets.load_dataset(source.hub_id, **named, **options)
        elif (folder := Path(source.path)).is_dir():
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                whole = datasets.load_from_disk(str(folder))
                yield from whole[split] if isinstance(whole, datasets.DatasetDict) else whole
            else:
                yield from datasets.load_dataset(str(folder), name=source.config, **options)
        else:
            files, builder = _files(source)
            if builder == "json":
                for file in files:
                    yield from _json_rows(Path(file))
            elif any(Path(file).stat().st_size for file in files):  # of empty files alone no columns can be told
                own = {"data_files": files, **(_csv_options(source) if builder == "csv" else {})}
                yield from datasets.load_dataset(builder, **own, **(options | {"split": "train"}))
    except DataError:
        raise
    except Exception as error:  # the readers below raise classes of their own without a common root
        raise _unreadable(source, error) from error


def _files(source: PromptSource) -> tuple[list[str], str]:
    """Lists the files of a pattern in order, and names the reader of their format."""
    files = [source.path] if Path(source.path).is_file() else sorted(glob.glob(source.path, recursive=True))
    if not files:
        raise DataError(
            f"The prompt source {source.path} does not exist.", "Paths are relative to the run file; hub:ORG/NAME."
        )
    builder = _BUILDERS.get(Path(files[0]).suffix.lower())
    if builder is None:
        raise DataError(
            f"The prompt source {source.path} ends in {Path(files[0]).suffix!r}.",
            "Use .jsonl, .json, .csv, .parquet, the folder of a data set or hub:ORG/NAME.",
        )
    return files, builder


def _csv_options(source: PromptSource) -> dict[str, Any]:
    """Options by which CSV is read as it stands: "NA", "007" and "true" are texts, and no column is an index."""
    used = (source.prompt, source.messages, source.context, source.answer, *source.where)
    converters = dict.fromkeys(filter(None, used), str)
    return {"converters": converters, "index_col": False, "keep_default_na": False, "encoding": _ENCODING}


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
        remedy = "Check name, config, split, revision, token and network, or name a local file or folder as path."
    return DataError(f"The prompt source {source.path} cannot be read ({reason}).", remedy)


def select_prompts(rows: Iterable[Any], columns: PromptColumns, path: Path, kind: PromptKind) -> Iterable[Prompt]:
    """Yields the prompts of rows of `path` that meet `where`, long ones too; rows with an empty text are left out."""
    others = [name for name in (columns.context, columns.answer) if name]
    for index, row in enumerate(rows):  # numbered before `where`, so that a number points into the file
        _require(row, list(columns.where), path)
        # CSV knows no types, so `refusal_cue: true` must also match the text "true".
        if any(str(row[name]).strip().lower() != str(value).lower() for name, value in columns.where.items()):
            continue
        text_column = row.get(columns.prompt)
        chat = text_column if isinstance(text_column, list) else row.get(columns.messages)
        is_chat = isinstance(text_column, list) or (text_column in (None, "") and columns.messages in row)
        _require(row, others if is_chat else [columns.prompt, *others], path)
        # Readers of tables fill columns that a row lacks with None; an empty text is meant.
        if text_column is None and chat is None:
            raise DataError(
                f"Row {index + 1} of {path} has no value in {columns.prompt!r}, and no conversation.",
                "Give it one, name its column as `prompt` or `messages`, or leave the row out by `where`.",
            )
        text, context, answer = (
            "" if not name or row.get(name) is None else str(row[name]).strip()
            for name in (columns.prompt, columns.context, columns.answer)
        )
        system: str | None = None
        earlier: tuple[tuple[TurnRole, str], ...] = ()
        if is_chat:
            text = ""
        if is_chat and chat:
            system, earlier, text = read_conversation(chat, f"row {index + 1} of {path}")
        if not text:
            continue
        full = f"{text}\n\n{context}" if context else text
        prompt = Prompt("", full, kind, answer or None, path.stem, system=system, earlier=earlier)
        # The digest keeps ids apart where two files share a name, or two sources read other columns of one row.
        digest = hashlib.sha256(prompt.transcript.encode()).hexdigest()[:6]
        yield replace(prompt, prompt_id=f"{path.stem}-{index:05d}-{digest}")


def read_conversation(messages: Any, where: str) -> tuple[str | None, tuple[tuple[TurnRole, str], ...], str]:
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
