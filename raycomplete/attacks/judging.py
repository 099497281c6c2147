"""Judges at work: batches of responses, and outcomes that are never asked for twice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from raycomplete.attacks.trial import Response, Trial
from raycomplete.runtime.types import Codec, Judge, Outcome, Prompt

Triple = tuple[Prompt, str, str]  # prompt, the attacker's part of the answer, what the model added


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that would rather see many responses at once, such as a model."""

    def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
        """One outcome each, in order."""


def judged(judge: Judge, codec: Codec, pairs: Sequence[tuple[Trial, Response]]) -> list[Outcome]:
    """What a model did with each trial."""
    return judged_texts(judge, [(trial.prompt, *texts(codec, response)) for trial, response in pairs])


def judged_texts(judge: Judge, triples: Sequence[Triple]) -> list[Outcome]:
    """The same from texts."""
    if isinstance(judge, BatchJudge):
        return judge.outcomes(triples)
    return [judge.outcome(*triple) for triple in triples]


def filled(template: str, slots: Mapping[str, str]) -> str:
    """A template with its `{slots}` filled; what is filled in is not searched for slots again."""
    found = re.compile("|".join(rf"\{{{name}\}}" for name in slots))
    return found.sub(lambda match: slots[match.group()[1:-1]], template)


def texts(codec: Codec, response: Response) -> tuple[str, str]:
    """The attacker's part of the answer and what the model added."""
    prefill, tokens = response.prefill, response.tokens
    return (codec.decode(prefill) if prefill else "", codec.decode(tokens) if tokens else "")


def measured(judge: Judge) -> dict[str, Any] | None:
    """The judge's own error rates against people, where it publishes them (attribute `measured`)."""
    found = getattr(judge, "measured", None)
    return dict(found) if isinstance(found, Mapping) else None


def sees_goal(judge: Judge) -> bool:
    """Whether the judge compares the answer with the prompt; one that does not says so (attribute `sees_goal`)."""
    return bool(getattr(judge, "sees_goal", True))
