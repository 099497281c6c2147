"""`raycomplete submit`: a run file as a job of Ray's job system, checked here before anything is uploaded.

The printed line is what anyone may type instead: `ray job submit ... -- python jobs/train.py RUNFILE`. On the cluster
the job stands in a copy of the working folder, so every path of the run file is looked at from there.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raycomplete.config import RunConfig, load_run_file
from raycomplete.runtime.errors import ConfigError, SetupError

JOBS = {"train": True, "align": True, "diagnose": True, "evaluate": False, "serve": False}  # takes --resume?
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT_S = 300  # between `ray job stop` and SIGKILL; Ray's own 3 s are too short for a checkpoint
EXCLUDES = ("/runs", ".*_cache")  # beside .git, .venv and __pycache__, and what .gitignore and .rayignore name
_PASSED_ON = ("RAYCOMPLETE_LOG", "RAYCOMPLETE_TRACEBACK")  # no token or key is ever among them
_LARGE_MIB = 100
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_WRITTEN = ("output.root", "align.output", "teacher.cache_dir", "serve.state")
_OWN_SECTIONS = ("align", "diagnose", "serve")  # read by the job of that name only


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be sent.

    Attributes:
        address: Of the cluster's job server.
        working_dir: Folder that is uploaded.
        entrypoint: Command in that folder's copy.
        environment: Variables of the job.
        warnings: What may go wrong over there, a sentence each.
    """

    address: str
    working_dir: Path
    entrypoint: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Everything of Ray's runtime environment but the working folder."""
        return {"excludes": list(EXCLUDES), "env_vars": self.environment}

    def command(self) -> str:
        """The same as a line for a shell."""
        words = ["ray", "job", "submit", "--address", self.address, "--working-dir", str(self.working_dir)]
        words += ["--runtime-env-json", json.dumps(self.runtime_env), "--", *self.entrypoint]
        # Ray prefers these two to what the command line says.
        unset = [
            word for name in _ADDRESSES if os.environ.get(name, self.address) != self.address for word in ("-u", name)
        ]
        return shlex.join((["env", *unset] if unset else []) + words)


def prepare(
    run_file: Path,
    overrides: Sequence[str] = (),
    *,
    job: str = "train",
    address: str | None = None,
    working_dir: Path = Path(),
    flags: Sequence[str] = (),
) -> Submission:
    """Checks a job on this machine.

    Args:
        run_file: A file below `working_dir`.
        overrides: As for `raycomplete train`.
        job: One of `JOBS`.
        address: Of the job server; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine when absent.
        working_dir: Folder to upload.
        flags: `--resume` or `--overwrite`.

    Raises:
        ConfigError: The run file is wrong, or cannot be read from the job's folder.
        SetupError: The working folder is larger than Ray takes.
    """
    if job not in JOBS:
        raise ConfigError(f"There is no job {job!r}.", f"--job takes {', '.join(JOBS)}.")
    if flags and not JOBS[job]:
        raise ConfigError(f"{flags[0]} is not for --job {job}.", "Leave it out: what is finished is never made again.")
    config = load_run_file(run_file, overrides)
    folder = working_dir.resolve()
    if not folder.is_dir():
        raise ConfigError(f"The working folder {working_dir} does not exist.", "Give --working-dir a folder.")
    name = _below(run_file.resolve(), folder)
    if name is None:
        raise ConfigError(
            f"The run file {run_file} lies outside the working folder {folder}, so the job would not find it.",
            "Give --working-dir a folder that holds it.",
        )
    files = uploaded_files(folder)
    if folder / name not in files:
        raise ConfigError(
            f"The run file {run_file} is not uploaded, since .gitignore, .rayignore or submit itself leaves it out.",
            "Move it to another folder of the working folder.",
        )
    script = f"jobs/{job}.py"
    start = [script] if (folder / script) in files else ["-m", "raycomplete", job]
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))}
    environment |= {variable: os.environ[variable] for variable in _PASSED_ON if variable in os.environ}
    return Submission(
        address=(address or _known_address()).rstrip("/"),
        working_dir=folder,
        entrypoint=("python", *start, name.as_posix(), *overrides, *flags),
        environment=environment,
        warnings=(*_size_warnings(files), *path_warnings(config, job, folder, files)),
    )


def uploaded_files(folder: Path, limit: int | None = None) -> dict[Path, int]:
    """Sizes in bytes of the files that Ray would upload, by Ray's own rules of ignoring.

    Raises:
        SetupError: Together they are larger than Ray takes.
    """
    from ray._private import ray_constants  # Ray tells nobody else what it leaves out
    from ray._private.runtime_env import packaging

    limit = packaging.GCS_STORAGE_MAX_SIZE if limit is None else limit
    found: dict[Path, int] = {}
    total = 0

    def note(path: Path) -> None:
        nonlocal total
        if not path.is_file():
            return
        found[path] = path.stat().st_size
        total += found[path]
        if total > limit:
            largest = sorted(found, key=lambda item: found[item], reverse=True)[:3]
            names = ", ".join(f"{item.relative_to(folder)} ({_mib(found[item])} MiB)" for item in largest)
            raise SetupError(
                f"The working folder {folder} has more than the {_mib(limit)} MiB that Ray uploads; largest so far: "
                f"{names}.",
                "Name what the job does not need in .rayignore, or give --working-dir a smaller folder.",
            )

    excludes = [packaging._get_excludes(folder, [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES])]
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    packaging._dir_travel(folder, excludes, note, include_gitignore=with_gitignore, logger=_Silent())
    return found


def path_warnings(config: RunConfig, job: str, folder: Path, files: Iterable[Path]) -> list[str]:
    """Paths of a run file that a node of the cluster may not find, each with what to do."""
    there = set(files)
    there |= {parent for path in files for parent in path.parents}
    warnings = []
    for key, path in (*_models(config, job), *_paths(config)):
        section = key.partition(".")[0]
        if section in _OWN_SECTIONS and section != job:
            continue
        if key in _WRITTEN:
            if not path.is_absolute() and ":/" not in str(path):
                warnings.append(
                    f"{key} is {str(path)!r}: it would lie in the job's own copy of the working folder, which goes "
                    f"with the job. Add {key}=/a/folder/that/every/node/sees."
                )
        elif path.is_absolute() and _below(path, folder) is None:
            warnings.append(f"{key}: {path} is outside of the working folder: name a path that every node sees.")
        elif folder / path not in there:
            reason = "is left out of the upload" if (folder / path).exists() else "does not exist in the working folder"
            warnings.append(f"{key}: {path} {reason}, so the job will not find it.")
    return warnings


def _models(config: RunConfig, job: str) -> Iterator[tuple[str, Path]]:
    for role in ("base", "aligned", "student"):
        spec = getattr(config.models, role)
        is_made = job == "align" and role != "base"
        if spec is not None and ":" not in spec and not is_made:  # hub:, organism: and package: are found by name
            yield f"models.{role}", Path(spec).expanduser()


def _paths(item: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """Every path in a section, with its key."""
    if isinstance(item, Path):
        yield key, item
    elif isinstance(item, BaseModel):
        for name in type(item).model_fields:
            yield from _paths(getattr(item, name), f"{key}.{name}".lstrip("."))
    elif isinstance(item, list | tuple):
        for index, value in enumerate(item):
            yield from _paths(value, f"{key}[{index}]")


def _below(path: Path, folder: Path) -> Path | None:
    """The path as seen from a folder, or None where it lies elsewhere."""
    return path.relative_to(folder) if path.is_relative_to(folder) else None


def _size_warnings(files: dict[Path, int]) -> list[str]:
    size = sum(files.values())
    if size < _LARGE_MIB * 2**20:
        return []
    largest = max(files, key=lambda item: files[item])
    return [f"{_mib(size)} MiB are uploaded, {_mib(files[largest])} of them {largest}: .rayignore leaves out files."]


def _known_address() -> str:
    for name in _ADDRESSES:
        value = os.environ.get(name, "")
        if "://" in value and not value.startswith("ray://"):
            return value
    return DEFAULT_ADDRESS


def _mib(size: int) -> int:
    return round(size / 2**20)


class _Silent:
    """Takes the log lines of Ray's walk through the folder."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
