"""The rooms of the package: who may import whom, and which third parties each room may see.

The two tables are the rule; the rest of the file reads imports with `ast` and compares.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raycomplete"
MAX_LINES = 400

# From upper to lower. A room imports only rooms of the lines above it, and itself.
LINES: tuple[frozenset[str], ...] = (
    frozenset({"errors", "types", "config", "files", "logs", "stopping", "waiting", "disk", "metrics_file"}),
    frozenset({"core", "plan"}),
    frozenset({"data"}),
    frozenset({"engine_options", "ray_calls", "observe", "storage"}),
    frozenset({"scoring", "rollout", "training", "evaluation", "serving", "report"}),
)
# The first line may import within itself, and so may wiring: the modules of the package root that no line names
# (pipeline, cluster, doctor, cli, demo and the like).
FOUNDATION = LINES[0]

WIRING = "wiring"
WIRING_FOLDERS = frozenset({"doctor", "pipeline"})  # any other folder must stand in a line above
# Third party -> where it may be imported: a room, a file, or WIRING. Names with a dot narrow the rule of their parent.
ALLOWED: dict[str, frozenset[str]] = {
    "vllm": frozenset({"scoring", "rollout"}),
    "deepspeed": frozenset({"training"}),
    "ray": frozenset({"ray_calls", "observe", "scoring", "rollout", "training", "serving", WIRING}),
    "ray.train": frozenset({"training"}),
    "ray.serve": frozenset({"serving", WIRING}),
    "transformers": frozenset({"data"}),
    "datasets": frozenset({"data"}),
    "pyarrow": frozenset({"data", "storage"}),
    "fsspec": frozenset({"storage"}),
    "fastapi": frozenset({"serving"}),
    "starlette": frozenset({"serving"}),
    "scipy": frozenset({"evaluation"}),
    "matplotlib": frozenset({"report"}),
    "jinja2": frozenset({"report", "serving"}),
    "typer": frozenset({WIRING}),
    "rich": frozenset({WIRING, "data/organism/build.py"}),
}
# Importable before torch is (seconds), so that a wrong run file is refused at once.
WITHOUT_TORCH = (*sorted(FOUNDATION), "engine_options", "plan", "storage")
MAY_IMPORT_TRITON = "core"  # and there in one file only


class Import(NamedTuple):
    """One imported module: `file` relative to the package, `typing_only` under `if TYPE_CHECKING`."""

    file: str
    line: int
    module: str
    typing_only: bool = False

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
            yield Import(file, node.lineno, module, typing_only=id(node) in guarded)


def room_of(file: str) -> str:
    """`core/loss.py` -> core, `config.py` -> config, `__init__.py` -> errors (the top line: it may import nothing)."""
    first = Path(file).parts[0].removesuffix(".py")
    return "errors" if first == "__init__" else first


def is_wiring(room: str) -> bool:
    return not any(room in line for line in LINES)


def rank(room: str) -> int:
    return next((i for i, line in enumerate(LINES) if room in line), len(LINES))


def breaks_room_order(item: Import) -> bool:
    parts = item.module.split(".")
    if parts[0] != "raycomplete" or len(parts) == 1 or parts[1].startswith("__"):
        return False
    importer, imported = room_of(item.file), parts[1]
    if importer == imported:
        return False
    if rank(importer) == rank(imported):
        return not (importer in FOUNDATION or is_wiring(importer))
    return rank(importer) < rank(imported)


def breaks_third_party_table(item: Import) -> bool:
    room = room_of(item.file)
    places = {room, item.file} | ({WIRING} if is_wiring(room) else set())
    for length in range(item.module.count(".") + 1, 0, -1):
        name = ".".join(item.module.split(".")[:length])
        if name in ALLOWED:
            return not places & ALLOWED[name]
    return False


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [
        item
        for path in source_files()
        for item in imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
    ]


def test_rooms_import_only_upper_rooms(imports: list[Import]) -> None:
    assert [str(item) for item in imports if breaks_room_order(item)] == []


def test_third_parties_stay_in_their_rooms(imports: list[Import]) -> None:
    assert [str(item) for item in imports if breaks_third_party_table(item)] == []


def test_triton_is_imported_by_one_file_of_core(imports: list[Import]) -> None:
    files = {item.file for item in imports if item.module.split(".")[0] == "triton"}
    assert {room_of(file) for file in files} <= {MAY_IMPORT_TRITON}
    assert len(files) <= 1


def test_first_line_is_importable_without_torch(imports: list[Import]) -> None:
    heavy = {"torch", "transformers", "ray", "vllm"}
    found = [
        str(item)
        for item in imports
        if room_of(item.file) in WITHOUT_TORCH and item.module.split(".")[0] in heavy and not item.typing_only
    ]
    assert found == []


def test_every_folder_is_a_room_of_the_table() -> None:
    folders = {path.relative_to(PACKAGE).parts[0] for path in source_files() if path.parent != PACKAGE}
    assert folders <= WIRING_FOLDERS.union(*LINES)


def test_no_file_is_too_long() -> None:
    files = [*source_files(), *(ROOT / "jobs").glob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob(".setup/*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("file", "source", "is_wrong"),
    [
        ("core/loss.py", "from raycomplete.runtime.types import TokenKind", False),
        ("config.py", "from raycomplete.runtime.errors import ConfigError", False),
        ("scoring/engine.py", "from raycomplete.data import chat", False),
        ("cli.py", "from raycomplete.pipeline import run", False),
        ("demo.py", "import raycomplete.engines.scoring_engine", False),
        ("data/chat.py", "from raycomplete.scoring import cache", True),
        ("training/worker.py", "def f():\n    import raycomplete.engines.rollout_engine", True),
        ("evaluation/runner.py", "from raycomplete import rollout", True),
        ("report/html.py", "from raycomplete.pipeline import run", True),
        ("errors.py", "from raycomplete import core", True),
    ],
)
def test_room_order_is_told_from_its_breach(file: str, source: str, is_wrong: bool) -> None:
    assert any(breaks_room_order(item) for item in imports_of(source, file)) is is_wrong


@pytest.mark.parametrize(
    ("file", "source", "is_wrong"),
    [
        ("scoring/engine.py", "from vllm import LLM", False),
        ("training/worker.py", "from ray import train", False),
        ("training/worker.py", "from ray.train.torch import TorchTrainer", False),
        ("cluster.py", "import ray", False),
        ("serving/app.py", "from ray import serve", False),
        ("data/organism/build.py", "from rich.progress import track", False),
        ("rollout/pool.py", "import ray.train", True),
        ("evaluation/runner.py", "import ray", True),
        ("core/loss.py", "from transformers import AutoModel", True),
        ("doctor.py", "import vllm", True),
        ("data/prompts.py", "import rich", True),
        ("report/html.py", "from fastapi import FastAPI", True),
    ],
)
def test_third_party_table_is_told_from_its_breach(file: str, source: str, is_wrong: bool) -> None:
    assert any(breaks_third_party_table(item) for item in imports_of(source, file)) is is_wrong
