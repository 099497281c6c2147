"""The run folder: who may write into it, and its files of settings and versions."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig, dump, load_run_file
from raycomplete.data.inputs import environment
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json, write_text
from raycomplete.runtime.logs import announce_run, begin

# Keys that may differ between a run and its resumption: where and for how long, and how much memory. None of them
# changes what is computed.
_FREE_KEYS = {
    "train": {
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "checkpoint_hashes",
        "stall_timeout_s",
        "max_failures",
        "max_bad_steps",
        "per_device_batch_size",
        "loss_chunk_tokens",
        "gradient_checkpointing",
    },
    "rollout": {"timeout_s", "gpu_memory_utilization"},
}


def open_run_folder(
    config: RunConfig,
    *,
    resume: bool,
    same: Collection[str],
    overwrite: bool = False,
    keep_config: bool = False,
    free: Collection[str] = (),
) -> Path:
    """Creates the run folder, or opens it again for `--resume`.

    Args:
        config: Resolved run file; written as config.yaml.
        resume: Continue what is there; what is there must come from the same settings.
        same: Sections that must be the same to continue.
        overwrite: Remove an earlier run first (the demo does).
        keep_config: Leave a config.yaml that is there as it is.
        free: Keys of these sections that may differ all the same, as `models.max_length`.

    Raises:
        ConfigError: The folder holds a run and neither was asked for, or it was made with other settings.
    """
    versions = check_run_folder(config, resume=resume, overwrite=overwrite, same=same, free=free)
    folder = config.output.folder
    settings = folder / "config.yaml"
    if overwrite and not resume and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (keep_config and settings.is_file()):
        write_text(settings, dump(config))
    write_json(folder / "environment.json", versions)
    begin("driver")
    return folder


def check_run_folder(
    config: RunConfig, *, resume: bool, same: Collection[str], overwrite: bool = False, free: Collection[str] = ()
) -> dict[str, str]:
    """Refuses what `open_run_folder` would refuse, before anything is started, and writes nothing.

    From here on logs and metrics of all processes bear the run's name.

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
            _check_same(load_run_file(settings), config, folder, same, free)
        elif not overwrite:
            raise ConfigError(
                f"The run folder {folder} holds a run already.",
                "Add --resume to continue it or --overwrite to replace it, or choose another output.name.",
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"The folder {folder} is not empty and holds no run.", "Choose another output.name.")
    announce_run(config.output.name, folder)
    return environment()


def _check_same(before: RunConfig, now: RunConfig, folder: Path, same: Collection[str], free: Collection[str]) -> None:
    old, new = _compared(before, same, free), _compared(now, same, free)
    # A key that is free in one of the two only, since rollout.on_policy differs, is missing from the other.
    changed = sorted(name for name in old if name in new and old[name] != new[name])
    if changed:
        raise ConfigError(
            f"The run in {folder} was started with other values of {', '.join(changed)}.",
            "Resume with the same run file and overrides, or choose another output.name.",
        )


def _compared(config: RunConfig, same: Collection[str], extra: Collection[str]) -> dict[str, Any]:
    """Values that must not change, by section or by key where a section has free keys."""
    found: dict[str, Any] = {}
    for section, values in config.model_dump(mode="json", include=set(same)).items():
        free = _FREE_KEYS.get(section, set()) | {
            key.partition(".")[2] for key in extra if key.startswith(f"{section}.")
        }
        if not free:
            found[section] = values
            continue
        if config.rollout.on_policy:  # the rollout engines get weights at every checkpoint
            free = free - {"checkpoint_every"}
        found |= {f"{section}.{key}": value for key, value in values.items() if key not in free}
    return found
