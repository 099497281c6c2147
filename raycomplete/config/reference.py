"""Writes the reference of the run file, docs/run-file.md, from the descriptions of its fields.

python -m raycomplete.config.reference > docs/run-file.md
"""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raycomplete.attacks.attack import AttackConfig
from raycomplete.attacks.registry import ATTACKS
from raycomplete.config.defences import DEFENCES, DefenceConfig
from raycomplete.config.run import RunConfig
from raycomplete.config.study import StudyConfig
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import METHODS, DepthConfig, Method

_HEAD = """# Run file

A run file is YAML. `models` and `data` must stand in it; everything else has a default. The command line replaces
single values: `raycomplete train run.yaml train.steps=50`. Unknown keys are refused with the nearest known one, and
keys of earlier versions with their new name. `extends: other.yaml` at its top takes every value that does not stand in
it from another run file of its folder. Relative paths start in the folder of the run file. Those of `output`, `serve`
and of every checkpoint (`models`, `rollout.harmful_from`,
`evaluation.prefill_from`, ...) start where the command is started.

This page is generated from the descriptions of the fields (`python -m raycomplete.config.reference`)."""
_PLAIN: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def markdown() -> str:
    """Returns the reference as Markdown: a table for each section, then one for each other method and each attack."""
    places: dict[type[BaseModel], list[str]] = {}
    _find(RunConfig, "", places)
    whole, *sections = places
    parts = [_HEAD, _table(whole)]
    for section in sections:
        first, *others = (f"`{key}`" for key in places[section])
        also = [f"The same at {', '.join(others)}."] if others else []
        parts += [f"## {first}", _text(section), *also, _table(section)]
    parts += ["# Other methods", "Each has the keys of every method (`name` to `depth` above) and these of its own."]
    for name, method in METHODS.items():
        if method is not Completion and _is_ours(method):
            parts += [f"## Method `{name}`", *_own(method, Method)]
    parts += ["# Attacks", "Entries of `evaluation.attacks`. What several attacks have in common is listed once."]
    attacks = {name: attack.config_class for name, attack in ATTACKS.items() if _is_ours(attack.config_class)}
    for base in dict.fromkeys(_base(section) for section in attacks.values()):
        if base is not AttackConfig:
            those = ", ".join(f"`{name}`" for name, section in attacks.items() if _base(section) is base)
            parts += [f"## Attacks {those}", _text(base), _table(base, leave_out=("name",))]
    for name, section in attacks.items():
        parts += [f"## Attack `{name}`", *_own(section, _base(section))]
    for name, defence in DEFENCES.items():
        if _is_ours(defence):
            parts += [f"## Defence `{name}`", _text(defence), _table(defence, leave_out=("name",))]
    parts += ["# Study file", _text(StudyConfig), _table(StudyConfig)]
    return "\n\n".join(parts) + "\n"


def _base(section: type[BaseModel]) -> type[BaseModel]:
    """The class whose settings an attack has besides its own."""
    base = section.__bases__[0]
    assert issubclass(base, BaseModel)
    return base


def _own(section: type[BaseModel], base: type[BaseModel]) -> list[str]:
    """Text, other defaults than those of the base, and a table of the fields that the base does not have."""
    theirs = base.model_fields
    other = [
        f"`depth.max` is `{default.max}`" if isinstance(default, DepthConfig) else f"`{name}` is {_default(field)}"
        for name, field in section.model_fields.items()
        if name in theirs and name != "name"
        for default in [field.get_default(call_default_factory=True)]
        if default != theirs[name].get_default(call_default_factory=True)
    ]
    text = [_text(section), f"By default {', '.join(other)}." if other else ""]
    return [" ".join(filter(None, text)), _table(section, leave_out=tuple(theirs))]


def _is_ours(section: type[BaseModel]) -> bool:
    """False for what a plugin added in this process."""
    return section.__module__.startswith(("raycomplete.methods.", "raycomplete.attacks.", "raycomplete.config."))


def _find(section: type[BaseModel], key: str, places: dict[type[BaseModel], list[str]]) -> None:
    """Notes the keys at which a section and those below it stand, depth first."""
    places.setdefault(section, []).append(key)
    for name, field in section.model_fields.items():
        inner = _inner(field.annotation)
        if inner is not None and not issubclass(inner, AttackConfig | DefenceConfig):
            is_list = get_origin(field.annotation) is list
            inner = Completion if inner is Method else inner  # the default; what others have is told at the end
            _find(inner, f"{key}.{name}".lstrip(".") + "[]" * is_list, places)


def _text(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").partition("\n\n")[0].split())


def _table(section: type[BaseModel], leave_out: tuple[str, ...] = ()) -> str:
    """A row for each field: required fields first, sections last. The program sets fields without a description."""
    fields = [
        (name, field) for name, field in section.model_fields.items() if name not in leave_out and _meaning(field)
    ]
    if not fields:
        return "No settings of its own."
    fields.sort(key=lambda item: (not item[1].is_required(), _inner(item[1].annotation) is not None))
    rows = [f"| `{name}` | {_value(field)} | {_default(field)} | {_meaning(field)} |" for name, field in fields]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def _meaning(field: FieldInfo) -> str:
    inner = _inner(field.annotation)
    text = field.description or ("" if inner is None else _text(inner).partition(". ")[0].removesuffix("."))
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        return ", ".join(f"`{item.name}`" for item in value)
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def _value(field: FieldInfo) -> str:
    bounds = [(sign, getattr(item, name, None)) for item in field.metadata for name, sign in _BOUNDS]
    return ", ".join([_type(field.annotation), *(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)])


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(item) for item in arguments if item is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is Annotated:
        return _type(arguments[0])
    return "mapping"


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, by itself or in a list."""
    found = next((item for item in (annotation, *get_args(annotation)) if isinstance(item, type)), None)
    return found if found is not None and issubclass(found, BaseModel) else None


if __name__ == "__main__":
    print(markdown(), end="")
