"""Reads run files: YAML and overrides in, a checked `RunConfig` out, every mistake in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raycomplete.config.diagnosis import PromptSource
from raycomplete.config.run import RunConfig
from raycomplete.methods.registry import Method, method_class
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.plugins import load_plugins, located
from raycomplete.runtime.section import removed, without_removed

# Relative paths of these keys start where the command is started; all others start in the folder of the run file.
_NOT_BESIDE_THE_RUN_FILE = ("output.", "serve.")

T = TypeVar("T")


def load_run_file(
    path: str | Path, overrides: Iterable[str] = (), *, sections: Collection[str] | None = None
) -> RunConfig:
    """Reads and checks a run file, after the plugins that it names have been imported.

    Args:
        path: YAML file. Its key `extends` names a file of the same folder, of which it replaces single values.
        overrides: `key.sub=value` strings, values in YAML notation, applied last.
        sections: Reads these sections alone and imports no plugins, for the record of an earlier run.

    Raises:
        ConfigError: The file is missing, not YAML, or holds a wrong key or value, or a plugin cannot be imported.
    """
    file = Path(path)
    tree = read_tree(file)
    # The name first: settings of that method stand before it, too.
    for override in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        apply_override(tree, override)
    if sections is not None:
        tree = without_removed({name: value for name, value in tree.items() if name in sections})
    return parse(tree, str(file), base_folder=file.parent.resolve(), plugins=sections is None)


def read_tree(file: Path, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads the mapping of a run file, laid over that of the file that it extends; nothing is checked yet."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The run file {file} cannot be read ({error.strerror}).", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The run file {file} is not UTF-8 text ({error.reason}).", "Check the path.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The run file {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"The run file {file} must hold a mapping with the keys {', '.join(RunConfig.model_fields)}.")
    if "extends" not in tree:
        return tree
    name = tree.pop("extends")
    if not isinstance(name, str) or Path(name).name != name or name in (file.name, *extending):
        raise ConfigError(
            f"The run file {file} extends {name!r}.",
            "Name another run file of the same folder, which does not extend this one.",
        )
    return merged(read_tree(file.with_name(name), (*extending, file.name)), tree)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping with the values of another in it, section by section; lists are replaced as a whole."""
    changed = {
        key: merged(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
        for key, value in over.items()
    }
    return {**under, **changed}


def parse(tree: Mapping[str, Any], origin: str, base_folder: Path | None = None, *, plugins: bool = False) -> RunConfig:
    """Checks a run file that is already a mapping; never set `plugins` for a mapping that somebody sent."""
    if plugins:
        load_plugins(path if base_folder is None else located(path, base_folder) for path in _plugins(tree, origin))
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explained(error, tree)}") from error
    if base_folder is None:
        return config

    def absolute(key: str, path: Path) -> Path:
        if key.startswith("plugins["):
            return located(path, base_folder)
        is_elsewhere = path.is_absolute() or key.startswith(_NOT_BESIDE_THE_RUN_FILE)
        return path if is_elsewhere else (base_folder / path).resolve()

    return map_paths(config, absolute)


def map_paths(item: T, change: Callable[[str, Path], Path], key: str = "") -> T:
    """Returns the same section, list or value with every path in it replaced by `change(key, path)`."""
    new: Any = item
    if isinstance(item, Path):
        new = change(key, item)
    elif isinstance(item, PromptSource) and item.hub_id is None:
        new = item.model_copy(update={"path": str(change(f"{key}.path", Path(item.path)))})
    elif isinstance(item, BaseModel):
        values = {name: getattr(item, name) for name in type(item).model_fields}
        new = item.model_copy(
            update={name: map_paths(value, change, f"{key}.{name}".lstrip(".")) for name, value in values.items()}
        )
    elif isinstance(item, list):
        new = [map_paths(value, change, f"{key}[{index}]") for index, value in enumerate(item)]
    result: T = new
    return result


def dump(config: RunConfig) -> str:
    """The resolved run file as YAML; `load_run_file` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _plugins(tree: Mapping[str, Any], origin: str) -> list[Path]:
    """Files and modules under the key `plugins` of a run file that is not checked yet."""
    paths = tree.get("plugins") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{origin}: plugins must be a list of Python files or modules.")
    return [Path(path) for path in paths]


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Puts the value of `key.sub=value` into a mapping; another `method.name` drops settings that it does not have."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"The override {override!r} is not of the form key.sub=value.")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"The override {override!r} goes below {parent!r}, which holds a plain value.")
        node = child
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is not valid YAML.") from error
    if key == "method.name" and read != node.get(leaf, "completion"):
        node = tree["method"] = shared_settings(node)
    node[leaf] = read


def shared_settings(method: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those settings of a method that another one has, too."""
    return {key: value for key, value in method.items() if key in Method.model_fields and key != "name"}


def explained(error: ValidationError, tree: Mapping[str, Any], section: type[BaseModel] = RunConfig) -> str:
    """Says in words what is wrong with a mapping that pydantic refused as a run file, or as another section."""
    return "; ".join(_explain(dict(item), tree, section) for item in error.errors())


def _explain(item: dict[str, Any], tree: Mapping[str, Any], whole: type[BaseModel]) -> str:
    """One pydantic error in words, with the nearest known key where a key is unknown."""
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        own = f"methods.{tree['method'].get('name')}.{'.'.join(location[1:])}" if location[0] == "method" else where
        if reason := removed(where) or removed(own) or removed(f"sources.{location[-1]}"):
            return f"the key {where!r} is gone: {reason}"
        known = _known_keys(item["loc"][:-1], tree, whole)
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}, {hint}"
    if item["type"] == "missing":
        return f"the key {where!r} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _known_keys(location: tuple[Any, ...], tree: Mapping[str, Any], whole: type[BaseModel]) -> list[str]:
    """Keys of the section at a location, list indices skipped."""
    section: Any = whole
    for part in location:
        if isinstance(part, int):
            continue
        if section is RunConfig and part == "method":  # its class depends on its name
            section = method_class(tree["method"].get("name", "completion"))
            continue
        annotation = section.model_fields[part].annotation
        arguments = [item for item in getattr(annotation, "__args__", ()) if _is_section(item)]
        section = annotation if _is_section(annotation) else arguments[0]
    return list(section.model_fields)


def _is_section(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)
