"""Errors: they survive the way between processes, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from raycomplete.runtime import errors
from raycomplete.runtime.errors import RaycompleteError, RefusedError, WorkError

ALL = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, RaycompleteError)]
STANDARD = {"WaitTimeoutError": TimeoutError, "NotFiniteError": FloatingPointError}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling_and_belong_to_a_family(kind: type[RaycompleteError]) -> None:
    for arguments in (("It is broken.", "Mend it."), ("It is broken.",)):
        error = kind(*arguments)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert (again.problem, again.remedy, str(again)) == (error.problem, error.remedy, str(error))
        assert str(again) == " ".join(arguments)
    assert error.exit_code == (2 if issubclass(kind, RefusedError) else 1)
    assert isinstance(error, STANDARD.get(kind.__name__, Exception))
    assert not issubclass(kind, RefusedError) or issubclass(kind, ValueError)
    assert not issubclass(kind, WorkError) or issubclass(kind, RuntimeError)


def test_a_death_keeps_its_facts_across_processes() -> None:
    facts = {"role": "base scorer", "node": "10.0.0.2", "cause": "out of memory", "saved": "step 40"}
    again = pickle.loads(pickle.dumps(errors.ProcessDiedError("The base scorer died.", "Resume.", **facts)))
    shown = ["who", "node", "likely cause", "kept", "go on"]
    assert again.details() == list(zip(shown, [*facts.values(), "Resume."], strict=True))
