"""The table of methods, and that it costs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import METHODS, Method, RowSpan, TrainSequence, method_class, parse_method, register
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import ConfigError


def test_methods_are_found_by_name_and_completion_is_the_default() -> None:
    assert parse_method({}) == Completion()
    assert parse_method({"name": "sft", "anchor_batch_size": 3}) == SFT(anchor_batch_size=3)
    with pytest.raises(ConfigError, match="no training method 'rlhf'") as error:
        method_class("rlhf")
    assert "augmentation, circuit_breakers, completion" in str(error.value.remedy)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_run_file_leaves_out_of_depth_is_the_methods_own_default(name: str) -> None:
    depth = parse_method({"name": name}).depth
    assert parse_method({"name": name, "depth": {"decay": 0.5}}).depth == depth.model_copy(update={"decay": 0.5})


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Method):
        name: Literal["mine"] = "mine"

    monkeypatch.setitem(METHODS, "mine", Mine)
    monkeypatch.delitem(METHODS, "mine")
    assert register(Mine) is Mine
    assert method_class("mine") is Mine
    with pytest.raises(ValueError, match="a training method 'mine' already"):
        register(Mine)


def test_rows_are_counted_by_term() -> None:
    sequences = [
        TrainSequence((1, 2, 3, 4), (RowSpan("a", 1, 2), RowSpan("b", 3, 1))),
        TrainSequence((1, 2, 3), (RowSpan("a", 1, 2),)),
    ]
    assert SFT().normalisers(sequences) == {"a": 4, "b": 1}


def test_settings_of_methods_load_no_torch() -> None:
    code = "import sys, raycomplete.methods, raycomplete.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
