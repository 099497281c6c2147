"""Hidden states as arrays that cross process boundaries without a copy.

numpy has no bfloat16, so bf16 rows travel as uint16 bit patterns. Ray's object store hands numpy arrays to every
process of a node without copying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

HiddenArray = npt.NDArray[np.uint16] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to read, and where its response starts.

    Attributes:
        token_ids: Prompt followed by response tokens.
        num_prompt_tokens: Tokens before the response, at least 1.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompt_tokens < len(self.token_ids):
            raise ValueError(
                f"a score request needs at least one prompt and one response token, got {self.num_prompt_tokens} "
                f"prompt tokens of {len(self.token_ids)}"
            )

    @property
    def num_rows(self) -> int:
        """Response tokens, one row of hidden states each."""
        return len(self.token_ids) - self.num_prompt_tokens


def to_array(hidden_TH: torch.Tensor) -> HiddenArray:
    """[T, H] bfloat16 or float32 tensor to an array of the same bits."""
    hidden_TH = hidden_TH.detach().contiguous().cpu()
    if hidden_TH.dtype == torch.bfloat16:
        return hidden_TH.view(torch.uint16).numpy()
    return hidden_TH.to(torch.float32).numpy()


def to_tensor(array: HiddenArray) -> torch.Tensor:
    """The tensor that `to_array` was given; shares no memory with the read-only array of the object store."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
