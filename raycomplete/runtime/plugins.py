"""Python files and modules of the user's that add attacks, methods and loss terms, named under `plugins` of a run file.

Each is imported once in a process and registers what it adds while it is imported: a module of an installed package
under its own name, a file as a module below this one. That one's name holds the path of the file, so that a process
that unpickles an object of a plugin finds the file by itself, as training workers on other nodes do.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from raycomplete.runtime.errors import ConfigError

__path__: list[str] = []  # lets Python import modules below this one, which the finder finds
_PREFIX = f"{__name__}.file_"


def load_plugins(paths: Iterable[Path]) -> None:
    """Imports plugins that this process has not imported yet.

    A file that changes afterwards is not imported again.
    """
    for path in paths:
        if not is_module(path) and (not path.is_file() or path.suffix != ".py"):
            problem = "is not the name of a Python file (.py)" if path.is_file() else "does not exist"
            raise ConfigError(f"The plugin {path} {problem}.", "Check the path; it is relative to the run file.")
        try:
            importlib.import_module(str(path) if is_module(path) else module_name(path))
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            if isinstance(error, SyntaxError) and error.filename == str(path):
                lines.append(error.lineno)
            place = f"{path}:{lines[-1]}" if lines else str(path)
            reason = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
            raise ConfigError(
                f"The plugin {place} failed while it was imported: {type(error).__name__}{reason and f': {reason}'}."
            ) from error


def is_module(plugin: Path) -> bool:
    """Tells whether a plugin is named as `import` names it, and not by a file."""
    return plugin.suffix != ".py" and all(part.isidentifier() for part in str(plugin).split("."))


def located(plugin: Path, folder: Path) -> Path:
    """Returns the absolute path of a plugin's file, which may be relative to a folder; a module stays as named."""
    file = (folder / plugin).resolve()
    return plugin if plugin.is_absolute() or (is_module(plugin) and not file.is_file()) else file


def module_name(path: Path) -> str:
    """The name under which a plugin is imported: its path, in a form that Python takes as a name."""
    return _PREFIX + str(path).encode().hex()


class _PluginFinder(MetaPathFinder):
    """Finds the file of a plugin by the name of its module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        try:
            file = bytes.fromhex(fullname.removeprefix(_PREFIX)).decode()
        except ValueError:
            return None
        return spec_from_file_location(fullname, file)


if not any(type(finder).__name__ == _PluginFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_PluginFinder())
