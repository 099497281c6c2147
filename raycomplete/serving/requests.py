"""Turns a request into the run file of its evaluation, and refuses whatever can be refused without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.attacks.attack import AttackConfig
from raycomplete.attacks.registry import build_attack, parse_attack
from raycomplete.config import RunConfig, parse
from raycomplete.runtime.errors import ConfigError, RefusedError
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving.schemas import EvaluationRequest

_SCHEMES = ("organism", "package", "hub")  # checkpoints that are no paths


class ForbiddenError(RefusedError):
    """A request for a file or checkpoint that this server does not give access to."""


@dataclass(frozen=True)
class Admission:
    """Checks what requests ask for.

    Attributes:
        config: The server's own run file, from which requests take whatever they leave out.
    """

    config: RunConfig

    def known_models(self) -> list[str]:
        """Lists the checkpoints that may be asked for by name."""
        models = self.config.models
        own = [models.base, models.aligned, models.student or models.aligned]
        return list(dict.fromkeys([*own, *self.config.serve.models]))

    def admit(self, request: EvaluationRequest) -> EvaluationRequest:
        """Returns the same request with checked, absolute model paths and complete attack settings.

        Raises:
            ForbiddenError: A checkpoint or file lies outside what this server allows.
            UnknownAttackError: There is no such attack.
            ConfigError: A value is out of its range.
        """
        for name in ("num_prompts", "attack_prompts"):
            value = getattr(request, name)
            if value is not None and value > self.config.serve.max_prompts:
                raise ConfigError(f"{name} is {value}, and this server allows {self.config.serve.max_prompts}.")
        if len(set(request.roles)) < len(request.roles):
            raise ConfigError("roles names a model twice.")
        has_student = request.models.student is not None or self.config.models.student is not None
        if request.roles == ["student"] and not has_student:  # beside others it is left out where there is none
            raise ConfigError("roles names the student alone, and this server has none.", "Set models.student.")
        changed: dict[str, Any] = {"roles": [role for role in MODEL_ROLES if role in request.roles]}
        changed["models"] = {name: self._model(spec) for name, spec in request.models if spec is not None}
        if request.attacks is not None:
            changed["attacks"] = [self._attack(entry).model_dump(mode="json") for entry in request.attacks]
        admitted = EvaluationRequest.model_validate(request.model_dump() | changed)
        run_config(self.config, admitted, Path("checked") / "only")
        return admitted

    def _model(self, spec: str) -> str:
        if spec in self.known_models():
            return spec
        roots = self.config.serve.model_roots
        if self.config.models.trust_remote_code:
            words = f"This server runs code of checkpoints, so it evaluates its own alone and not {spec!r}."
            raise ForbiddenError(words, f"Allowed: {', '.join(self.known_models())}.")
        if spec.partition(":")[0] in _SCHEMES:
            raise ForbiddenError(f"This server does not evaluate {spec!r}.", self._allowed())
        path = _below(spec, roots)
        if path is None:
            raise ForbiddenError(f"The checkpoint {spec!r} lies outside the allowed folders.", self._allowed())
        if not path.exists():
            raise ConfigError(f"There is no checkpoint at {spec!r}.", "Check the path.")
        for file in path.iterdir() if path.is_dir() else ():
            if _below(str(file), roots) is None:
                raise ForbiddenError(
                    f"{file.name} of the checkpoint {spec!r} is a link out of the allowed folders.", self._allowed()
                )
        return str(path)

    def _attack(self, entry: str | dict[str, Any]) -> AttackConfig:
        attack = parse_attack(entry)
        changed: dict[str, Any] = {}
        for name, value in attack:
            if not isinstance(value, Path):
                continue
            path = _below(str(value), self.config.serve.data_roots)
            if path is None:
                raise ForbiddenError(
                    f"The file {str(value)!r} of the attack {attack.name} lies outside the allowed folders.",
                    f"Allowed: {_names(self.config.serve.data_roots)}.",
                )
            if not path.is_file():
                raise ConfigError(f"There is no file {str(value)!r}.", "Check the path.")
            changed[name] = path
        attacker = build_attack(attack).attacker_checkpoint
        if attacker is not None:
            changed["attacker"] = self._model(attacker)
        return attack.model_copy(update=changed)

    def _allowed(self) -> str:
        named = ", ".join(self.known_models())
        return f"Allowed: {named}, and what lies below {_names(self.config.serve.model_roots)}."


def run_config(config: RunConfig, request: EvaluationRequest, folder: Path) -> RunConfig:
    """Builds the run file of one evaluation.

    Args:
        config: The server's own run file.
        request: As admitted.
        folder: The run folder of this evaluation.

    Raises:
        ConfigError: Settings do not fit together.
    """
    tree = config.model_dump(mode="json")
    tree["output"] = {"root": str(folder.parent), "name": folder.name}
    tree["models"] |= request.models.model_dump(exclude_none=True)
    if request.seed is not None:
        tree["data"]["seed"] = request.seed
    sections = ("attacks", "depths", "max_tokens", "num_prompts", "attack_prompts", "save_completions")
    tree["evaluation"] |= {name: value for name in sections if (value := getattr(request, name)) is not None}
    return parse(tree, "The request")


def _below(path: str, roots: Iterable[Path]) -> Path | None:
    """Follows every link of a path; None where it does not lie below one of the roots then."""
    try:
        found = Path(path).resolve()
        found.lstat()  # names that no file can have fail here
    except (FileNotFoundError, NotADirectoryError):
        pass  # refused below where it is outside, before it tells what is there
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path!r} cannot be the path of a file.") from error
    return found if any(found.is_relative_to(root.resolve()) for root in roots) else None


def _names(roots: Iterable[Path]) -> str:
    return ", ".join(map(str, roots)) or "no folder"
