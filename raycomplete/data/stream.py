"""Streams prompts from large inputs, and writes results partition by partition.

Inputs are read row by row (`raycomplete.data.prompts`); nothing is held but 8 bytes a prompt, which tell repeats. A
partition is one Parquet file, whole or absent, that names the prompts it was made from: a finished one is never made
again, and one made from other prompts is never mistaken for it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raycomplete.config import PromptSource
from raycomplete.data.prompts import source_prompts
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, write_bytes
from raycomplete.runtime.types import Prompt, PromptKind

Columns = dict[str, npt.NDArray[Any]]

_METADATA_KEY = b"raycomplete"


def stream_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> Iterator[Prompt]:
    """Yields the prompts of several sources one after the other, repeats dropped (same text, first wins)."""
    seen: set[bytes] = set()
    for source in sources:
        for prompt in _limited(source_prompts(source, kind), source, seed):
            digest = hashlib.blake2b(prompt.transcript.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                yield prompt


def partitions(prompts: Iterable[Prompt], size: int) -> Iterator[tuple[Prompt, ...]]:
    """Yields prompts in groups of `size`, the last one smaller; only one group is held."""
    stream = iter(prompts)
    while group := tuple(islice(stream, size)):
        yield group


def content_key(prompts: Sequence[Prompt]) -> str:
    """Returns a hash that names the content of a partition: ids, texts, answers, and conversations."""
    content = json.dumps([[prompt.prompt_id, prompt.text, prompt.answer, *prompt.context] for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write_partition(path: Path, columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes one partition atomically, readable by the owner only: it may hold harmful text or tokens."""
    table = pa.table(dict(columns)).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes(), mode=PRIVATE)


def partition_metadata(path: Path) -> dict[str, Any] | None:
    """Reads the metadata of a partition; None where there is none or it cannot be read."""
    try:
        stored = pq.read_schema(path).metadata or {}
        found: dict[str, Any] = json.loads(stored[_METADATA_KEY])
    except (OSError, KeyError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        return None
    return found


def read_partition(path: Path) -> Columns:
    """Reads the columns of a partition as arrays."""
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The partition {path} cannot be read ({error}).", "Remove it and run with --resume."
        ) from error
    return {name: np.asarray(table.column(name).to_numpy()) for name in table.column_names}


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
