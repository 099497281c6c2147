"""The web page: one document with its style and script inside, which its Content-Security-Policy names by hash."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

_SCRIPTS = ("client.js", "format.js", "charts.js", "views.js", "main.js")


@cache
def page() -> str:
    """The document."""
    return _read("page.html").replace("/*STYLE*/", _style()).replace("/*SCRIPT*/", _script())


@cache
def content_security_policy() -> str:
    """Nothing but the page's own script and style runs, and it talks to its own server only."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(_script())}'",
            f"style-src '{_hash(_style())}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


@cache
def _script() -> str:
    return '"use strict";\n' + "\n".join(_read(name) for name in _SCRIPTS)


@cache
def _style() -> str:
    return _read("page.css")


def _read(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
