"""The documents: links, run-file keys, commands and paths that they name exist, and the generated page is fresh."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import typer
import yaml
from pydantic import BaseModel

import raycomplete as rc
from raycomplete.cli import app
from raycomplete.config import RunConfig
from raycomplete.config.reference import markdown
from raycomplete.methods.registry import METHODS, Method
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").glob("*.md"))]
PAGES.append(ROOT / "tests" / "benchmarks" / "README.md")
RUN_FILES_OF_THE_READER = {"jobs/mine.yaml"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# The notes record earlier versions, with the keys and files of their time.
present_pages = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "notes"], ids=lambda page: str(page.relative_to(ROOT))
)


def fences(text: str, *languages: str) -> list[str]:
    """Code blocks in one of some languages ("" for none)."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for language, body in found if language in languages]


def code_spans(text: str) -> list[str]:
    without_fences = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences)]


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pages
def test_relative_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), link


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        found = {(page.parent / link).resolve() for link in links if ":" not in link}
        to_read += [file for file in found if file not in seen and file.exists()]
    assert set(PAGES) <= seen


def test_reference_of_the_run_file_is_fresh() -> None:
    written = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: python -m raycomplete.config.reference > docs/run-file.md"


# --- Keys of the run file --------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a field may hold, those of every training method included."""
    if isinstance(annotation, type) and issubclass(annotation, Method):
        return list(METHODS.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, list) or hasattr(annotation, "__metadata__"):
        return [model for argument in get_args(annotation) for model in models_in(argument)]
    return []


def has_key(model: type[BaseModel], path: list[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    if len(path) == 1 or get_origin(field.annotation) is dict:  # a mapping's keys are the user's
        return True
    return any(has_key(inner, path[1:]) for inner in models_in(field.annotation))


def mentioned_keys(text: str) -> Iterator[str]:
    """`section.key` and deeper, wherever it stands."""
    sections = "|".join(RunConfig.model_fields)
    for found in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-z_]+)+(?![\w/])", text):
        if not re.search(r"\.(py|yaml|md|json|jsonl|html|sh)$", found):
            yield found


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@present_pages
def test_keys_of_the_run_file_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = set(mentioned_keys(text))
    for block in fences(text, "yaml"):
        tree = yaml.safe_load(block)
        if not set(tree) <= set(RunConfig.model_fields):
            continue  # no run file
        for plugin in tree.get("plugins", []):
            assert (ROOT / "docs" / "examples" / plugin).exists()
            tree.pop("method", None)  # the plugin's, and the plugin's test reads it
        found |= set(keys_of(tree))
    unknown = {key for key in found if not has_key(RunConfig, key.split("."))}
    assert not unknown


def test_a_key_that_does_not_exist_is_noticed() -> None:
    assert list(mentioned_keys("set `train.stepz` in cluster.yaml")) == ["train.stepz"]
    assert not has_key(RunConfig, ["train", "stepz"])
    assert has_key(RunConfig, ["train", "validation", "every"])
    assert has_key(RunConfig, ["method", "weights", "anchor"])


# --- Commands and paths ----------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[list[str]]:
    """Words after `raycomplete` in shell blocks and code spans."""
    lines = "\n".join(fences(text, "sh", "")).replace("\\\n", " ").splitlines()
    for line in [*lines, *code_spans(text)]:
        for part in re.split(r"&&|\|\|", line):
            if re.match(r"\s*raycomplete( |$)", part):
                yield shlex.split(part, comments=True)[1:]


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    top: Any = typer.main.get_command(app)
    for words in command_lines(page.read_text(encoding="utf-8")):
        if not words or words == ["--help"]:
            continue
        command, rest = top.commands[words[0]], words[1:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


@present_pages
def test_paths_of_the_repository_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    words = {word for line in [*code_spans(text), *fences(text, "sh", "yaml", "")] for word in line.split()}
    pattern = r"(?:raycomplete|jobs|tests|docs)/[\w./-]+\.(?:py|yaml|json|md|csv)"
    named = {word for word in words if re.fullmatch(pattern, word)}
    assert {word for word in named - RUN_FILES_OF_THE_READER if not (ROOT / word).exists()} == set()


@pages
def test_make_targets_exist(page: Path) -> None:
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z-]+)", listed, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    lines = [*code_spans(text), *"\n".join(fences(text, "sh")).splitlines()]
    assert {found[1] for line in lines if (found := re.match(r"make ([a-z-]+)", line.strip()))} <= targets


@pages
def test_python_in_pages_is_python_and_its_names_exist(page: Path) -> None:
    for block in fences(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        for dotted in re.findall(r"\brc\.([a-z_.]+)", block):
            value: Any = rc
            for name in dotted.rstrip(".").split("."):
                value = getattr(value, name)


@pytest.mark.parametrize(
    ("guide", "example"),
    [("add-an-attack", "add_attack"), ("add-a-method", "add_method"), ("add-a-loss-term", "add_method")],
)
def test_a_guide_shows_the_file_that_its_test_runs(guide: str, example: str) -> None:
    first = fences((ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8"), "python")[0]
    assert first in (ROOT / "docs" / "examples" / f"{example}.py").read_text(encoding="utf-8")
