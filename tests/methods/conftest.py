"""Methods bring terms along, which leave the table with their test."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from raycomplete.losses.terms import TERMS


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    with patch.dict(TERMS):
        yield
