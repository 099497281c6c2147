"""The bearer token: where it comes from, and the digest that is all that the service keeps of it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from raycomplete.config import ServeConfig
from raycomplete.runtime.errors import ConfigError

TOKEN_VARIABLE = "RAYCOMPLETE_TOKEN"
MIN_TOKEN_CHARACTERS = 16


def is_loopback(host: str) -> bool:
    """Tells whether an address or name means this machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_token_digest(config: ServeConfig) -> str | None:
    """Returns the SHA-256 of the token; None where there is none and none is needed.

    The token itself is not kept: Ray stores what deployments are made with, and logs may print it.

    Raises:
        ConfigError: The token is missing where other machines can connect, unreadable or too weak.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and config.token_file is not None:
        try:
            token = Path(config.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"The token file {config.token_file} cannot be read ({type(error).__name__}).",
                "Check serve.token_file and its permissions.",
            ) from error
    if not token:
        if is_loopback(config.host) and config.token_file is None:
            return None
        raise ConfigError(
            f"Listening on {config.host} lets other machines connect, and there is no token."
            if config.token_file is None
            else f"The token file {config.token_file} is empty.",
            f"Set {TOKEN_VARIABLE} or serve.token_file, or listen on 127.0.0.1.",
        )
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The token must have at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces.",
            'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return digest(token)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", errors="surrogateescape")).hexdigest()


def is_bearer(header: str | None, expected: str) -> bool:
    """Tells whether an Authorization header carries the token with that digest; takes as long for any wrong one."""
    scheme, _, token = (header or "").partition(" ")
    return hmac.compare_digest(digest(token.strip()), expected) and scheme.lower() == "bearer"
