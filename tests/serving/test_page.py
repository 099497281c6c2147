"""The page as text: whole, self-contained, and without a way in for markup."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from raycomplete.serving.gate import content_security_policy, page


class Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inside[self._open] = self.inside.get(self._open, "") + data


@pytest.fixture(scope="module")
def parts() -> Parts:
    found = Parts()
    found.feed(page())
    return found


def test_the_policy_names_exactly_the_script_and_style_of_the_page(parts: Parts) -> None:
    for tag in ("script", "style"):
        hashed = base64.b64encode(hashlib.sha256(parts.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{hashed}'" in content_security_policy()


def test_the_page_fetches_nothing_from_elsewhere(parts: Parts) -> None:
    assert [tag for tag, attributes in parts.tags if "src" in attributes] == []
    links = [attributes["href"] for tag, attributes in parts.tags if tag == "link"]
    assert links == ["data:,"]
    addresses = set(re.findall(r"https?://[^\"'`\s]+", page()))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name space, which nobody fetches"
    assert "@import" not in page()
    assert "url(" not in page()


def test_nothing_in_the_script_parses_markup(parts: Parts) -> None:
    ways_in = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "srcdoc",
        "eval(",
        "Function(",
    )
    assert [word for word in ways_in if word in parts.inside["script"]] == []
    assert [attributes for _, attributes in parts.tags if any(name.startswith("on") for name in attributes)] == []
    assert "localStorage" not in parts.inside["script"], "the token leaves with the tab"


def test_every_control_has_a_name(parts: Parts) -> None:
    labelled = {attributes.get("for") for tag, attributes in parts.tags if tag == "label"}
    source = page()
    for tag, attributes in parts.tags:
        if tag in ("input", "select"):
            identity = attributes["id"]
            wrapped = re.search(rf'<label[^>]*>[^<]*<{tag} id="{identity}"', source.replace("\n", " "))
            assert identity in labelled or wrapped, f"{identity} has no label"


def test_every_element_that_the_script_asks_for_is_there(parts: Parts) -> None:
    there = {attributes["id"] for _, attributes in parts.tags if "id" in attributes}
    assert set(re.findall(r'byId\("([^"]+)"\)', parts.inside["script"])) <= there


def test_every_part_is_shipped() -> None:
    names = {entry.name for entry in files("raycomplete.serving").joinpath("page").iterdir()}
    assert names == {"page.html", "page.css", "client.js", "format.js", "charts.js", "views.js", "main.js"}
    assert "/*SCRIPT*/" not in page()
    assert "/*STYLE*/" not in page()
