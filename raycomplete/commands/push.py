"""`raycomplete push`: the student of a run, with its model card, into a repository of the hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from raycomplete.evaluation.summary import defence_name
from raycomplete.report.model_card import CARD, write_model_card
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, DataError, SetupError, WorkError
from raycomplete.runtime.files import read_json

# Files of a checkpoint. Other files of a run folder hold harmful tokens and are never uploaded.
UPLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.png")


def push(run_folder: Path, repository: str, *, yes: bool = False, public: bool = False) -> list[Path]:
    """Lists what would be uploaded, and uploads it only where `yes` says so.

    The token comes from HF_TOKEN or from the login of the hub's own command. The repository is made where it is
    missing. Returns the files, the model card among them.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise ConfigError(f"{repository!r} names no repository.", "Write org/name.")
    if defence := defence_name(read_json(run_folder / "summary.json") or {}):
        raise DataError(
            f"The student of {run_folder} was evaluated behind the defence {defence}, which is not in its weights.",
            "Evaluate it by itself: raycomplete evaluate with evaluation.defence=null.",
        )
    card = write_model_card(run_folder)
    if card is None:
        words = f"The run {run_folder} has no exported student with an evaluation."
        raise DataError(words, "Finish it: raycomplete train.")
    student = card.parent
    files = sorted({path for pattern in UPLOADED for path in student.glob(pattern)})
    console, plain = Console(), RichConsole()
    sizes = [[path.name, _size(path.stat().st_size)] for path in files]
    total = sum(path.stat().st_size for path in files)
    console.table(f"To {repository} ({'public' if public else 'private'})", [["file", "size"], *sizes])
    left = sorted(path.name for path in student.iterdir() if path not in files)
    if left:
        console.note(f"Not uploaded: {', '.join(left)}")
    if not yes:
        plain.print(card.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        console.note(f"{len(files)} files, {_size(total)}. Nothing was uploaded: --yes uploads them.")
        return files
    address = _upload(student, files, repository, public)
    console.note(f"{len(files)} files, {_size(total)}, uploaded")
    plain.print(address, highlight=False, soft_wrap=True)
    return files


def _upload(student: Path, files: list[Path], repository: str, public: bool) -> str:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise SetupError("The hub is switched off (HF_HUB_OFFLINE).", "Unset it and run the same command again.")
    token = get_token()
    if token is None:
        raise SetupError("No token of the hub is there.", "Set HF_TOKEN, or log in once: hf auth login.")
    api = HfApi(token=token, library_name="raycomplete")
    try:
        found: Any = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise ConfigError(f"The repository {repository} is public.", "Add --public, or name another one.")
        api.upload_folder(
            repo_id=repository,
            folder_path=student,
            allow_patterns=[glob.escape(path.name) for path in files],  # a star of the hub's crosses folders
            commit_message=f"Student of raycomplete, with {CARD}",
        )
    except ConfigError:
        raise
    except Exception as error:  # of httpx, the hub and its storage, without a common root
        reason = " ".join(str(error).replace(token, "...").split())[:300]
        raise WorkError(
            f"The upload to {repository} failed ({type(error).__name__}: {reason}).",
            "Check the name, the token's rights and the network; the same command goes on where it stopped.",
        ) from error
    return str(found)


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
