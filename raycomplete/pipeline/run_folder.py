"""The run folder: who may write into it, and its files of settings and versions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig, dump, load_run_file
from raycomplete.errors import ConfigError
from raycomplete.pipeline.prepare import environment

# Sections that may differ between a run and its resumption: they change where and for how long, not what is computed.
_FREE_SECTIONS = {"cluster", "output", "scoring"}
_FREE_TRAIN_KEYS = {"checkpoint_every", "keep_checkpoints", "stall_timeout_s"}


def open_run_folder(
    config: RunConfig, *, resume: bool, overwrite: bool = False, same: Collection[str] | None = None
) -> Path:
    """Creates the run folder, or opens it again for `--resume`.

    Args:
        config: Resolved run file; written as config.yaml.
        resume: Continue what is there; what is there must come from the same settings.
        overwrite: Remove an earlier run first (the demo does).
        same: Sections that must be the same to continue; None means all that change what is computed. The config.yaml
            that is there is kept where only some are compared.

    Raises:
        ConfigError: The folder holds a run and neither was asked for, or it was made with other settings.
    """
    versions = check_run_folder(config, resume=resume, overwrite=overwrite, same=same)
    folder = config.output.folder
    settings = folder / "config.yaml"
    if overwrite and not resume and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if same is None or not settings.is_file():
        _write(settings, dump(config))
    write_json(folder / "environment.json", versions)
    return folder


def check_run_folder(
    config: RunConfig, *, resume: bool, overwrite: bool = False, same: Collection[str] | None = None
) -> dict[str, str]:
    """Refuses what `open_run_folder` would refuse, before anything is started, and writes nothing.

    Returns:
        Versions of what the run will use.

    Raises:
        ConfigError: See `open_run_folder`.
        SetupError: vLLM is not installed.
    """
    folder = config.output.folder
    settings = folder / "config.yaml"
    if settings.is_file():
        if resume:
            _check_same(load_run_file(settings), config, folder, same)
        elif not overwrite:
            raise ConfigError(
                f"The run folder {folder} holds a run already.",
                "Add --resume to continue it, or choose another output.name.",
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"The folder {folder} is not empty and holds no run.", "Choose another output.name.")
    return environment()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    _write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads JSON, or None where there is no file."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _check_same(before: RunConfig, now: RunConfig, folder: Path, same: Collection[str] | None) -> None:
    old, new = _compared(before), _compared(now)
    changed = sorted(
        name for name in old if old[name] != new[name] and (same is None or name.partition(".")[0] in same)
    )
    if changed:
        raise ConfigError(
            f"The run in {folder} was started with other values of {', '.join(changed)}.",
            "Resume with the same run file and overrides, or choose another output.name.",
        )


def _compared(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude=_FREE_SECTIONS)
    train = tree.pop("train")
    flat = {f"train.{key}": value for key, value in train.items() if key not in _FREE_TRAIN_KEYS}
    return {**tree, **flat}
