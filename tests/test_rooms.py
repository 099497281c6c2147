"""Rules of the whole tree: imports between rooms, third parties of each room, length, run-file keys, docstrings.

A room is a folder of the package. The tables are the rules; the rest of the file reads sources and compares.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, tracked_python

PACKAGE = ROOT / "raycomplete"
MAX_LINES = 700  # of a file
MAX_TOTAL_LINES = {"raycomplete": 35_150, "tests": 33_000}  # an addition pays by a removal
MAX_KEYS = 236  # rows of docs/run-file.md; as above
# First words of a docstring that says no sentence; the second rule is for the package alone.
RIDDLE = re.compile(r"(Of|What|Whether|See)\b")
MORE_RIDDLES = re.compile(r"(How|Where|Which|Who|That of|As many)\b")

# From lower to upper: a room imports rooms of the lines above it in this table. Rooms of one line may import each
# other's modules, and no import may run in a circle.
LINES: tuple[frozenset[str], ...] = (
    frozenset({"runtime"}),
    frozenset({"config", "data", "attacks", "methods", "losses"}),
    frozenset({"engines", "training", "evaluation", "diagnosis", "plan", "report", "storage"}),
    frozenset({"serving", "doctor"}),
    frozenset({"commands", "cli"}),
)
# Third party -> where it may be imported: a room or a file. Names with a dot narrow the rule of their parent.
ALLOWED: dict[str, frozenset[str]] = {
    "vllm": frozenset({"engines"}),
    "deepspeed": frozenset({"training"}),
    "ray": frozenset(
        {"runtime", "engines", "training", "evaluation", "diagnosis", "serving", "doctor", "commands", "plan"}
    ),
    "ray.train": frozenset({"training"}),
    "ray.serve": frozenset({"serving", "commands"}),
    "transformers": frozenset({"data"}),
    "datasets": frozenset({"data"}),
    "huggingface_hub": frozenset({"data", "report", "commands"}),
    "pyarrow": frozenset({"data", "storage"}),
    "fsspec": frozenset({"storage"}),
    "fastapi": frozenset({"serving"}),
    "starlette": frozenset({"serving"}),
    "sse_starlette": frozenset({"serving"}),
    "prometheus_client": frozenset({"serving"}),
    "openai": frozenset({"evaluation"}),
    "scipy": frozenset({"evaluation", "diagnosis"}),
    "matplotlib": frozenset({"report"}),
    "jinja2": frozenset({"report", "serving"}),
    "typer": frozenset({"cli", "commands"}),
    "rich": frozenset({"runtime", "cli", "commands", "doctor"}),
    "triton": frozenset({"losses/kernels.py"}),
}
# Importable before torch is (seconds), so that a wrong run file is refused at once.
WITHOUT_TORCH = ("runtime", "config", "attacks", "methods", "plan", "storage", "cli")
# Of the rooms above, files that only work imports, never a settings file.
MAY_IMPORT_TORCH = frozenset({"attacks/white_box.py"})
MAY_IMPORT_TORCH_INSIDE = frozenset({"methods"})  # their formulas, which training calls
MAY_IMPORT_RAY = frozenset({"runtime/ray_calls.py", "runtime/prometheus.py"})


class Import(NamedTuple):
    """One imported module: `file` relative to the package, `typing_only` under `if TYPE_CHECKING`."""

    file: str
    line: int
    module: str
    typing_only: bool = False
    inside: bool = False  # a function or a class

    def __str__(self) -> str:
        return f"raycomplete/{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Imports at any depth; `from a import b` counts as a.b, since b may be a module."""
    tree = ast.parse(source)
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(file, node.lineno, module, typing_only=id(node) in guarded, inside=node.col_offset > 0)


def room_of(file: str) -> str:
    """`losses/loss.py` -> losses, `cli.py` -> cli, `__init__.py` -> commands (the public API may import every room)."""
    first = Path(file).parts[0].removesuffix(".py")
    return "commands" if first in {"__init__", "__main__"} else first


def rank(room: str) -> int:
    return next((i for i, line in enumerate(LINES) if room in line), len(LINES))


def breaks_room_order(item: Import) -> bool:
    parts = item.module.split(".")
    if parts[0] != "raycomplete" or len(parts) == 1 or parts[1].startswith("__"):
        return False
    return rank(room_of(item.file)) < rank(parts[1])


def breaks_third_party_table(item: Import) -> bool:
    assert room_of(item.file) in frozenset().union(*LINES), f"{item.file} lies in no room of the table"
    places = {room_of(item.file), item.file}
    for length in range(item.module.count(".") + 1, 0, -1):
        name = ".".join(item.module.split(".")[:length])
        if name in ALLOWED:
            return not places & ALLOWED[name]
    return False


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [
        item
        for path in tracked_python("raycomplete")
        for item in imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
    ]


def test_rooms_import_only_upper_rooms(imports: list[Import]) -> None:
    assert [str(item) for item in imports if breaks_room_order(item)] == []


def test_third_parties_stay_in_their_rooms(imports: list[Import]) -> None:
    assert [str(item) for item in imports if breaks_third_party_table(item)] == []


def test_rooms_of_settings_are_importable_without_torch(imports: list[Import]) -> None:
    heavy = {"torch", "transformers", "ray", "vllm"}
    found = [
        str(item)
        for item in imports
        if room_of(item.file) in WITHOUT_TORCH
        and (name := item.module.split(".")[0]) in heavy
        and not item.typing_only
        and not (item.inside and room_of(item.file) in MAY_IMPORT_TORCH_INSIDE)
        and item.file not in (MAY_IMPORT_RAY if name == "ray" else MAY_IMPORT_TORCH)
    ]
    assert found == []


def test_no_import_runs_in_a_circle() -> None:
    """Imports at the top of modules; those inside functions run later, and those for types never."""
    modules = {
        ".".join(("raycomplete", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in tracked_python("raycomplete")
    }
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        found: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {
                    name if (name := f"{node.module}.{item.name}") in modules else node.module for item in node.names
                }
        edges[module] = found & modules.keys() - {module}
    while leaves := {module for module, found in edges.items() if not found & edges.keys()}:
        edges = {module: found for module, found in edges.items() if module not in leaves}
    assert sorted(edges) == []


def test_no_file_is_too_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked_python("raycomplete", "jobs", "tests", "docs", ".setup")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("folder", MAX_TOTAL_LINES)
def test_package_and_tests_stay_small(folder: str) -> None:
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tracked_python(folder))
    assert total <= MAX_TOTAL_LINES[folder]


def test_the_run_file_has_few_keys() -> None:
    rows = re.findall(
        r"^\| `(?!models` \| section)\w", (ROOT / "docs" / "run-file.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) <= MAX_KEYS


def test_no_docstring_begins_with_a_riddle() -> None:
    """Docstrings and strings below an attribute or a constant: all that stand alone."""
    found = []
    for path in tracked_python("raycomplete", "jobs", "tests", "docs"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                text = value.value.strip()
                if RIDDLE.match(text) or (MORE_RIDDLES.match(text) and path.is_relative_to(PACKAGE)):
                    found.append(f"{path.relative_to(ROOT)}:{value.lineno} {text[:60]}")
    assert found == []


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("losses/loss.py", "from raycomplete.runtime.types import Rate", None),
        ("config/run.py", "from raycomplete.attacks import registry", None),
        ("__init__.py", "from raycomplete.commands.train import train", None),
        ("training/trainer.py", "from ray.train.torch import TorchTrainer", None),
        ("serving/app.py", "from ray import serve", None),
        ("data/chat.py", "from raycomplete.engines import score_cache", breaks_room_order),
        ("training/worker.py", "def f():\n    import raycomplete.commands.train", breaks_room_order),
        ("evaluation/runner.py", "from raycomplete import serving", breaks_room_order),
        ("engines/rollout_pool.py", "import ray.train", breaks_third_party_table),
        ("losses/loss.py", "from transformers import AutoModel", breaks_third_party_table),
        ("report/html.py", "from fastapi import FastAPI", breaks_third_party_table),
    ],
)
def test_a_breach_is_noticed(file: str, source: str, rule: Callable[[Import], bool] | None) -> None:
    for check in (breaks_room_order, breaks_third_party_table):
        assert any(check(item) for item in imports_of(source, file)) is (check is rule)
