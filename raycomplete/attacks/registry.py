"""Attacks by name: `register` adds one, `parse_attack` checks its settings, and `build_attack` makes it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section, removed

AttackT = TypeVar("AttackT", bound=Attack[Any])
SectionT = TypeVar("SectionT", bound=Section)

_attacks: dict[str, type[Attack[Any]]] = {}
ATTACKS: Mapping[str, type[Attack[Any]]] = MappingProxyType(_attacks)  # those of the package and of loaded plugins


class UnknownAttackError(ConfigError):
    """An attack that does not exist."""

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(ATTACKS)


def register(config_class: type[AttackConfig]) -> Callable[[type[AttackT]], type[AttackT]]:
    """Makes a class decorator that adds an attack under the default of its settings' `name`.

    Raises:
        ConfigError: The settings have no name, or another attack has it.
    """
    name = config_class.model_fields["name"].default
    if not isinstance(name, str):
        remedy = 'Write: name: Literal["mine"] = "mine"'
        raise ConfigError(f"{config_class.__name__} has no default for `name`.", remedy)

    def add(attack: type[AttackT]) -> type[AttackT]:
        known = _attacks.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (attack.__module__, attack.__qualname__):
            raise ConfigError(f"The attack {name} of {attack.__module__} exists in {known.__module__}.", "Rename it.")
        attack.config_class = config_class
        _attacks[name] = attack
        return attack

    return add


def build_attack(config: AttackConfig) -> Attack[Any]:
    """Makes the attack of checked settings."""
    return ATTACKS[config.name](config)


def parse_attack(entry: str | Mapping[str, Any] | AttackConfig) -> AttackConfig:
    """Checks one item of `evaluation.attacks`: a name, or a mapping with `name` and settings."""
    if isinstance(entry, AttackConfig):
        return entry
    tree = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = tree.get("name")
    if not isinstance(name, str) or name not in ATTACKS:
        raise UnknownAttackError(f"There is no attack {name!r}.", f"Known attacks: {', '.join(ATTACKS)}.")
    return checked(ATTACKS[name].config_class, tree, f"attack {name}")


def checked(section: type[SectionT], tree: Mapping[str, Any], owner: str) -> SectionT:
    """Checks the settings of an attack, a defence or a judge, its `owner` in messages, or raises a ConfigError."""
    for key in tree:
        if key not in section.model_fields:
            kind, _, name = owner.partition(" ")
            if reason := removed(f"{kind}s.{name}.{key}"):
                raise ConfigError(f"The {owner} has no setting {key!r} any more: {reason}.")
            nearest = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.5)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Its settings: {', '.join(section.model_fields)}."
            raise ConfigError(f"The {owner} has no setting {key!r}.", hint)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"The {owner} cannot be used: {explain(error)}.") from error


def explain(error: ValidationError) -> str:
    """Says in words which settings are wrong."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc']))}: {str(item['msg']).removeprefix('Value error, ')}".removeprefix(": ")
        for item in error.errors()
    )
