"""Errors: they survive the way between processes, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from raycomplete.runtime import errors
from raycomplete.runtime.errors import RaycompleteError, RefusedError, WorkError

ALL = sorted(
    (item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, RaycompleteError)),
    key=lambda item: item.__name__,
)


def test_the_list_of_errors_is_not_empty() -> None:
    assert {RefusedError, WorkError} < set(ALL)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("arguments", [("It is broken.", "Mend it."), ("It is broken.",)], ids=["remedy", "bare"])
def test_errors_survive_pickling(kind: type[RaycompleteError], arguments: tuple[str, ...]) -> None:
    error = kind(*arguments)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.problem, again.remedy, str(again)) == (error.problem, error.remedy, str(error))
    assert str(again) == " ".join(arguments)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_exit_codes_follow_the_family(kind: type[RaycompleteError]) -> None:
    assert kind("p").exit_code == (2 if issubclass(kind, RefusedError) else 1)


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.SetupError, ValueError),
        (errors.ParityError, RuntimeError),
        (errors.WaitTimeoutError, TimeoutError),
        (errors.NotFiniteError, FloatingPointError),
    ],
)
def test_errors_can_be_caught_as_the_standard_ones(kind: type[RaycompleteError], standard: type[Exception]) -> None:
    with pytest.raises(standard, match="p r"):
        raise kind("p", "r")


def test_a_death_keeps_its_facts_across_processes() -> None:
    error = errors.ProcessDiedError(
        "The base scorer died.", "Resume.", role="base scorer", node="10.0.0.2", cause="out of memory", saved="step 40"
    )
    again = pickle.loads(pickle.dumps(error))
    assert again.details() == error.details()
    assert dict(again.details()) == {
        "who": "base scorer",
        "node": "10.0.0.2",
        "likely cause": "out of memory",
        "kept": "step 40",
        "go on": "Resume.",
    }
