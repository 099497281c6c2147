"""Checks who asks (the bearer token) and for what, and turns a request into the run file of its evaluation.

Whatever can be refused without torch is refused here.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.attacks.attack import AttackConfig
from raycomplete.attacks.registry import build_attack, parse_attack
from raycomplete.config import RunConfig, ServeConfig, parse
from raycomplete.data.organisms import ORGANISMS
from raycomplete.runtime.errors import ConfigError, RefusedError
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving.schemas import EvaluationRequest

TOKEN_VARIABLE = "RAYCOMPLETE_TOKEN"
MIN_TOKEN_CHARACTERS = 16
MAX_PROMPTS = 1000  # held-out prompts of each kind that a request may ask for
_SCHEMES = (*ORGANISMS, "package", "hub", "openai")  # checkpoints that are no paths


class ForbiddenError(RefusedError):
    """A request for a file or checkpoint that this server does not give access to."""


@dataclass(frozen=True)
class Admission:
    """Checks what requests ask for."""

    config: RunConfig  # the server's own run file, from which requests take whatever they leave out

    def known_models(self) -> list[str]:
        """Lists the checkpoints that may be asked for by name."""
        models = self.config.models
        own = [models.base, models.aligned, models.student or models.aligned]
        return list(dict.fromkeys([*own, *self.config.serve.models]))

    def admit(self, request: EvaluationRequest) -> EvaluationRequest:
        """Returns the same request with checked, absolute model paths and complete attack settings, or refuses it."""
        for name in ("num_prompts", "attack_prompts"):
            value = getattr(request, name)
            if value is not None and value > MAX_PROMPTS:
                raise ConfigError(f"{name} is {value}, and this server allows {MAX_PROMPTS}.")
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
                words = f"{file.name} of the checkpoint {spec!r} is a link out of the allowed folders."
                raise ForbiddenError(words, self._allowed())
        return str(path)

    def _attack(self, entry: str | dict[str, Any]) -> AttackConfig:
        attack = parse_attack(entry)
        changed: dict[str, Any] = {}
        for name, value in attack:
            if not isinstance(value, Path):
                continue
            roots = self.config.serve.data_roots
            path = _below(str(value), roots)
            if path is None:
                words = f"The file {str(value)!r} of the attack {attack.name} lies outside the allowed folders."
                raise ForbiddenError(words, f"Allowed: {_names(roots)}.")
            if not path.is_file():
                raise ConfigError(f"There is no file {str(value)!r}.", "Check the path.")
            changed[name] = path
        for setting, checkpoint in build_attack(attack).checkpoints.items():
            changed[setting] = self._model(checkpoint)
        return attack.model_copy(update=changed)

    def _allowed(self) -> str:
        named = ", ".join(self.known_models())
        return f"Allowed: {named}, and what lies below {_names(self.config.serve.model_roots)}."


def run_config(config: RunConfig, request: EvaluationRequest, folder: Path) -> RunConfig:
    """Builds the run file of one evaluation from the server's own, the admitted request and its run folder."""
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


def is_loopback(host: str) -> bool:
    """Tells whether an address or name means this machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_token_digest(config: ServeConfig) -> str | None:
    """Returns the SHA-256 of the token; None where there is none and none is needed.

    The token itself is not kept: Ray stores what deployments are made with, and logs may print it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and config.token_file is not None:
        try:
            token = Path(config.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            words = f"The token file {config.token_file} cannot be read ({type(error).__name__})."
            raise ConfigError(words, "Check serve.token_file and its permissions.") from error
    if not token:
        if is_loopback(config.host) and config.token_file is None:
            return None
        problem = f"The token file {config.token_file} is empty."
        if config.token_file is None:
            problem = f"Listening on {config.host} lets other machines connect, and there is no token."
        raise ConfigError(problem, f"Set {TOKEN_VARIABLE} or serve.token_file, or listen on 127.0.0.1.")
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The token must have at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces.",
            'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return digest(token)


def digest(token: str) -> str:
    """Returns the SHA-256 of a token in hex: all that the service keeps of it."""
    return hashlib.sha256(token.encode("utf-8", errors="surrogateescape")).hexdigest()


def is_bearer(header: str | None, expected: str) -> bool:
    """Tells whether an Authorization header carries the token with that digest; takes as long for any wrong one."""
    scheme, _, token = (header or "").partition(" ")
    return hmac.compare_digest(digest(token.strip()), expected) and scheme.lower() == "bearer"
