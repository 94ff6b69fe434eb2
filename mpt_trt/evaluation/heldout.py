"""File with windows of held-out text and the float32 reference's hidden states on them.

The reference is the same for every engine of a model, so it is computed once. The file contains the
head's inputs instead of logits: for MPT-7B, 16 kB instead of 200 kB per token, without rounding. A
product with the head gives the logits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_text_file
from mpt_trt.system.json_text import parse_json_object, shown
from mpt_trt.system.replace import replace_file
from mpt_trt.system.typed_json import from_json

METADATA_KEY = "mpt_trt"
MAKE_AGAIN = "delete it and make it again"


@dataclass(frozen=True)
class _Texts:
    """The part of HeldOut that is metadata."""

    text: str
    text_hash: str
    reference: str


@dataclass(frozen=True)
class HeldOut:
    """Windows of a text, and the reference's hidden states on them.

    tokens: int64 `[windows, length + 1]`; the model reads all but the last token of a window and
    predicts all but the first. hidden: float32 `[windows, length, hidden]`, the input of the
    reference's head. text: name of the text file. text_hash: its content hash. reference: the
    software that computed the reference.
    """

    tokens: NDArray[np.int64]
    hidden: NDArray[np.float32]
    text: str
    text_hash: str
    reference: str

    @property
    def inputs(self) -> NDArray[np.int64]:
        """The tokens that the model reads, `[windows, length]`."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> NDArray[np.int64]:
        """The token after each input, `[windows, length]`."""
        return self.tokens[:, 1:]


def read_text(path: Path) -> str:
    """Reads a text without changing its line ends; raises MptTrtError if that fails."""
    if not os.path.lexists(path):
        raise MptTrtError(f"{path}: no such file; set quality.text in config.yaml")
    return read_text_file(path)


def windows(tokens: list[int], num_windows: int, length: int) -> NDArray[np.int64]:
    """Selects up to `num_windows` windows without overlap, spread evenly over the text.

    Returns `[windows, length + 1]`; each window's last token is the next one's first.

    Raises MptTrtError when the text is shorter than one window.
    """
    available = (len(tokens) - 1) // length
    if available < 1:
        raise MptTrtError(
            f"the text has {len(tokens)} tokens, but a window of window_length = {length} needs "
            f"{length + 1}; take a longer text or shorter windows"
        )
    chosen = np.linspace(0, available - 1, min(num_windows, available)).round().astype(np.int64)
    return np.array(tokens, np.int64)[chosen[:, None] * length + np.arange(length + 1)]


def write_heldout(heldout: HeldOut, target: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes a safetensors file, atomically. inputs: see `replace_file`."""
    tensors: dict[str, NDArray] = {"tokens": heldout.tokens, "hidden": heldout.hidden}
    texts = asdict(_Texts(heldout.text, heldout.text_hash, heldout.reference))
    # One metadata entry, because safetensors writes several in random order.
    metadata = {METADATA_KEY: json.dumps(texts)}
    with replace_file(target, inputs) as partial:
        # save_file would make a file that only its owner can read.
        partial.write_bytes(save(tensors, metadata))


def read_heldout(path: Path) -> HeldOut:
    """Reads a file that `write_heldout` wrote; raises MptTrtError for any other."""
    if not path.is_file():
        raise MptTrtError(f"{path}: no such file; make it with compute_reference.py")
    try:
        with safe_open(path, framework="np") as file:
            if (metadata := (file.metadata() or {}).get(METADATA_KEY)) is None:
                raise ValueError("it has no texts")
            texts = from_json(_Texts, parse_json_object(metadata.encode(), path, MAKE_AGAIN))
            tokens, hidden = (file.get_slice(name) for name in ("tokens", "hidden"))
            _require_fitting(tokens, hidden)
            return HeldOut(file.get_tensor("tokens"), file.get_tensor("hidden"), **vars(texts))
    except MptTrtError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown(str(error))
        raise MptTrtError(
            f"{path}: not written by compute_reference.py, or damaged ({reason}); {MAKE_AGAIN}"
        ) from None


def _require_fitting(tokens: Any, hidden: Any) -> None:
    """Raises ValueError unless the slices are windows of a text and the hidden states on them."""
    shapes = tokens.get_shape(), hidden.get_shape()
    if (tokens.get_dtype(), hidden.get_dtype()) != ("I64", "F32"):
        raise ValueError(f"tokens and hidden are {tokens.get_dtype()} and {hidden.get_dtype()}")
    is_fitting = len(shapes[0]) == 2 and len(shapes[1]) == 3 and min(*shapes[0], *shapes[1]) > 0
    if not is_fitting or shapes[1][:2] != [shapes[0][0], shapes[0][1] - 1]:
        raise ValueError(f"tokens and hidden have shapes {shapes[0]} and {shapes[1]}")
