"""How a driver readies itself for engines beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from raycomplete.diagnosis import engines as diagnose_engines


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "engines", "expected"), [(8, 2, 6), (2, 2, 1), (2, 3, 1)])
def test_the_walk_takes_the_threads_that_engines_leave(
    threads: None, monkeypatch: pytest.MonkeyPatch, cores: int, engines: int, expected: int
) -> None:
    monkeypatch.setattr(diagnose_engines, "available_cpus", lambda: cores)
    torch.set_num_threads(7)
    diagnose_engines.make_room_for_engines(engines)
    assert torch.get_num_threads() == expected
