"""A model's tensors in PyTorch, by Hugging Face name, from any kind of checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpt_trt.arrays.cast import BFLOAT16
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import WeightReader, weights


class ModelTensors:
    """Copies of a model's tensors on one device, in one type."""

    def __init__(
        self,
        config: MptConfig,
        reader: WeightReader,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.config = config
        self.reader = reader
        self.device = torch.device("cpu") if device is None else device
        self.dtype = dtype
        self._weights = {w.hf_name: w for w in weights(config) if w.hf_name is not None}

    def tensor(self, name: str) -> Tensor:
        """Copies the tensor with this name, e.g. `blocks.0.norm_1.weight`."""
        stored = _as_torch(self.reader.tensor(self._weights[name]))
        # Always a copy, because the file is mapped for reading only.
        return stored.to(self.device, self.dtype, copy=True)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Copies all tensors whose names start with `prefix`; keys are the rest of their names."""
        names = [name for name in self._weights if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}


def embed(model: ModelTensors, embedding: Tensor, token_ids: Tensor) -> Tensor:
    """Computes the first block's input: token ids `[..., seq]` to `[..., seq, hidden]`.

    embedding: the model's `wte.weight`. Raises MptTrtError when the sequence is longer than
    `max_positions`.
    """
    config, length = model.config, token_ids.shape[-1]
    hidden = embedding[token_ids]
    if config.max_positions is not None and length > config.max_positions:
        kind = "learned positions" if config.position_embedding == "learned" else "positions"
        raise MptTrtError(
            f"{length} tokens, but the model has {kind} for {config.max_positions}; "
            "take fewer tokens"
        )
    if config.position_embedding != "learned":
        return hidden
    return hidden + model.tensor("wpe.weight")[:length]


def _as_torch(stored: NDArray[Any]) -> Tensor:
    """Makes a tensor that shares the array's memory and must not be written to."""
    with warnings.catch_warnings():
        # PyTorch warns that the array is read-only.
        warnings.simplefilter("ignore", UserWarning)
        if stored.dtype == BFLOAT16:
            return torch.from_numpy(stored.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(stored)
