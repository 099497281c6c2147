"""The sample file between rollouts and training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet, read_samples, write_samples
from raycomplete.runtime.errors import DataError
from tests.training.tiny import make_samples


def test_samples_come_back_equal(tmp_path: Path) -> None:
    samples = make_samples(4, anchor=5, recovery=3)
    odd = SampleSet(
        (*samples.anchor, AnchorSample('quote " and \u2028 line', (1,), (2, 3))),
        (*samples.recovery, RecoverySample("safety", (1,), (9, 1), (4,), (5, 6))),
        samples.profile,
    )
    write_samples(tmp_path / "new" / "samples.jsonl", odd)
    assert read_samples(tmp_path / "new" / "samples.jsonl") == odd


def test_only_the_owner_reads_the_file(tmp_path: Path) -> None:
    before = os.umask(0)  # the strictest test: nothing is masked away
    try:
        write_samples(tmp_path / "samples.jsonl", make_samples(0))
    finally:
        os.umask(before)
    assert (tmp_path / "samples.jsonl").stat().st_mode & 0o777 == 0o600


def test_samples_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """Its rows lack the fields that came later, and mean what they meant then."""
    path = tmp_path / "samples.jsonl"
    rows: list[dict[str, object]] = [
        {"part": "anchor", "sample_id": "a#0", "prompt_ids": [1], "answer_ids": [2, 3], "kind": "harmful"},
        {
            "part": "recovery",
            "sample_id": "a#0",
            "prompt_ids": [1],
            "teacher_prompt_ids": [1],
            "harmful_ids": [4],
            "refusal_ids": [5],
            "refusal_prefix_tokens": 0,
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(path)
    assert samples == SampleSet(
        (AnchorSample("a#0", (1,), (2, 3), "harmful"),), (RecoverySample("a#0", (1,), (1,), (4,), (5,)),)
    )
    assert samples.anchor[0].kept_ids == (2, 3)
    assert samples.anchor[0].plain_prompt_ids == (1,)


def test_a_missing_or_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with pytest.raises(DataError, match=f"{path} does not exist"):
        read_samples(path)
    write_samples(path, SampleSet((), make_samples(0).recovery))
    with pytest.raises(DataError, match=f"{path} holds no training sample"):
        read_samples(path)
