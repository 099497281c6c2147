"""The frame of a command: number format resolved, what its run folder lacks fetched, what it makes mirrored."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

from raycomplete.config import OutputConfig, RunConfig
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, WorkError
from raycomplete.storage import integrity
from raycomplete.storage.mirror import CLOSE_TIMEOUT_S, Manifest, Mirror, restore
from raycomplete.storage.remote import connect

P = ParamSpec("P")
Command = Callable[Concatenate[RunConfig, P], Path]


def stored(suffix: str = "", *, adds: bool = False) -> Callable[[Command[P]], Command[P]]:
    """Gives a command of the pipeline its number format of weights and its storage.

    With --resume it first refuses damaged checkpoints and, where the run file names a storage, fetches what is newer
    there. While the command works, a thread mirrors what it finishes; it begins once the command has opened its run
    folder, so that a refused one changes nothing in the storage. The command adds `suffix` to `output.name`; with
    `adds` it always adds to the run that is there.
    """

    def around(command: Command[P]) -> Command[P]:
        @wraps(command)
        def run(config: RunConfig, /, *arguments: P.args, **options: P.kwargs) -> Path:
            console = options.setdefault("console", Console()) or Console()
            assert isinstance(console, Console)
            config = resolve_dtype(config, console)
            resume = adds or bool(options.get("resume"))
            output, mirror = config.output.renamed(suffix), None
            if output.mirror is not None:
                mirror = _open(config, output, resume, bool(options.get("overwrite")), console)
            if options.get("resume") and not (output.folder / "student" / "config.json").is_file():
                integrity.newest_whole(output.folder / "checkpoints", warn=console.note)
            if mirror is None:
                return command(config, *arguments, **options)
            mirror.start()
            is_done = False
            try:
                folder = command(config, *arguments, **options)
                is_done = True
            finally:
                try:
                    with console.stage("Mirrored the rest to the storage"):
                        mirror.close(CLOSE_TIMEOUT_S, insist=is_done)
                except WorkError as error:
                    if is_done:
                        raise
                    console.note(str(error))  # the command's own failure counts
            return folder

        return run

    return around


def _open(config: RunConfig, output: OutputConfig, resume: bool, overwrite: bool, console: Console) -> Mirror:
    uri, train, folder = str(output.mirror), config.train, output.folder
    with console.stage(f"Checked the storage {uri.split('?')[0]}"):
        remote = connect(uri)
    if resume:
        with console.stage(f"Compared {folder} with the storage"):
            fetched = restore(remote, folder, hashed=True, warn=console.note)
        if fetched:
            console.note(f"Fetched from the storage: {', '.join(fetched)}")
    elif not overwrite and Manifest(remote).holds_run:
        raise ConfigError(
            f"The storage {remote.uri} holds a run already.",
            "Add --resume to continue it or --overwrite to replace it, or choose another output.name.",
        )
    before = _identity(folder)

    def is_ready() -> bool:  # a new run writes a config.yaml of its own: until then an earlier run is there, or none
        return (found := _identity(folder)) is not None and (resume or found != before)

    keep = train.keep_checkpoints
    return Mirror(remote, folder, keep=keep, warn=console.note, ready=is_ready, anew=not resume)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells one config.yaml from the next."""
    try:
        info = (folder / "config.yaml").stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns
