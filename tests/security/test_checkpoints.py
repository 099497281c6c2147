"""Malicious checkpoints: refused, or read without what they smuggle in. A file that code would make is the proof."""

from __future__ import annotations

import json
import os
import pickle
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycomplete.config import load_run_file
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model, tensor_files
from raycomplete.data.inputs import prepare_models
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import CheckpointError
from tests.conftest import ROOT
from tests.training.tiny import make_model


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self._mark}",))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that executed code would leave."""
    return tmp_path / "executed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", 0)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def prepare(folder: Path) -> None:
    """Everything that reads a checkpoint before a run starts, then the model itself."""
    overrides = [f"models.{role}={folder}" for role in ("base", "aligned", "student")]
    prepare_models(load_run_file(ROOT / "jobs" / "organism.yaml", [*overrides, "models.max_length=64"]))
    ChatCodec(folder).encode_prompt("a b")
    load_model(folder, "float32")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_opened(name: str, folder: Path, mark: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    prepare(folder)  # beside safetensors nobody looks at them
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        prepare(folder)
    assert not mark.exists()


def test_engines_read_safetensors_only() -> None:
    """vLLM's default would fall back to pickles where no safetensors are."""
    arguments = EngineSpec("somewhere", "float32", 64).arguments()
    assert (arguments["load_format"], arguments["trust_remote_code"]) == ("safetensors", False)


def test_a_pickle_that_calls_itself_safetensors_is_refused(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception, match=r"(?i)safetensor|header"):
        prepare(folder)
    assert not mark.exists()


def with_code(folder: Path, mark: Path, file: str, **values: Any) -> None:
    """Adds a module that leaves a mark, and names its classes in a file of the checkpoint."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\nclass EvilConfig: pass\n"
    (folder / "evil.py").write_text(code)
    change(folder / file, **values)


MODEL = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
TOKENIZER = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}


@pytest.mark.parametrize(
    ("file", "values", "is_refused"),
    [
        ("config.json", {"model_type": "evil", **MODEL}, True),
        ("tokenizer_config.json", TOKENIZER, True),
        ("config.json", MODEL, False),  # transformers has classes of its own for a known model
    ],
)
def test_code_of_a_checkpoint_never_runs(
    file: str, values: dict[str, Any], is_refused: bool, folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask whether to run the code, and wait, if nobody had answered already."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with_code(folder, mark, file, **values)
    with pytest.raises(CheckpointError) if is_refused else nullcontext():
        prepare(folder)
    assert not mark.exists()


def test_a_chat_template_reaches_nothing_of_python(folder: Path, mark: Path) -> None:
    codec = ChatCodec(folder)
    codec._tokenizer.chat_template = (
        "{{ cycler.__init__.__globals__.os.popen('touch " + str(mark) + "').read() }}{{ messages[0].content }}"
    )
    codec.save(folder)
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|access"):
        ChatCodec(folder).encode_prompt("a b")
    assert not mark.exists()


def test_an_adapter_beside_the_weights_is_refused(folder: Path, mark: Path) -> None:
    """transformers would load it over the weights, as a pickle too, and vLLM would not."""
    change_to = {"peft_type": "LORA", "base_model_name_or_path": "org/other", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(change_to))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError):
        prepare(folder)
    assert not mark.exists()


def test_kernels_of_the_hub_are_refused(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="stranger/attention")
    with pytest.raises(CheckpointError):
        prepare(folder)


@pytest.mark.parametrize(
    "target", ["../other/model.safetensors", "/etc/passwd", "pytorch_model.bin", "..", "a/b.safetensors"]
)
def test_an_index_stays_in_its_folder(target: str, folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", 1)
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        prepare(folder)
    with pytest.raises(CheckpointError):
        tensor_files(folder)  # as engines call it, which see no role


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', "[" * 100_000])
def test_a_broken_index_is_refused(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        prepare(folder)


def gguf_header(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        pickle.dumps({}),
        gguf_header(tensors=2**62, pairs=0),
        gguf_header(pairs=2**62),
        gguf_header(pairs=1, rest=struct.pack("<Q", 2**62) + b"x"),
        gguf_header(version=2**31),
        gguf_header(pairs=1, rest=struct.pack("<Q", 3) + b"abc" + struct.pack("<IIQ", 9, 9, 2**60)),
    ],
    ids=["empty", "magic only", "pickle", "tensors", "pairs", "long string", "version", "nested arrays"],
)
@pytest.mark.timeout(60)
def test_a_malicious_gguf_header_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCOMPLETE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(str(file), role="base")
    assert not (tmp_path / "cache" / "checkpoints").exists()


def test_nothing_beside_a_gguf_file_is_read(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what an impatient user types
    with_code(folder, mark, "tokenizer_config.json", **TOKENIZER)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (folder / "model.gguf").write_bytes(gguf_header())
    with pytest.raises(CheckpointError):
        resolve_checkpoint(str(folder / "model.gguf"), role="base")
    assert not mark.exists()


def test_torch_itself_would_have_run_the_payload(tmp_path: Path, mark: Path) -> None:
    """Guards the tests above: the files are malicious to a loader that opens them."""
    torch.save(Payload(mark), tmp_path / "pytorch_model.bin")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert mark.exists()
