"""File with windows of held-out text and the float32 reference's hidden states on them.

The reference is the same for every engine of a model, so it is computed once. The file contains the
head's inputs instead of logits: for MPT-7B, 16 kB instead of 200 kB per token, without rounding. A
product with the head gives the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpt_trt.errors import MptTrtError
from mpt_trt.system.replace import replace_file

METADATA_KEY = "mpt_trt"
TEXT_KEYS = ("text", "text_hash", "reference")


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
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise MptTrtError(f"{path}: no such file; set quality.text in config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MptTrtError(f"{path}: cannot be read as UTF-8 text: {error}") from None


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
    texts = {key: getattr(heldout, key) for key in TEXT_KEYS}
    # One metadata entry, because safetensors writes several in random order.
    metadata = {METADATA_KEY: json.dumps(texts)}
    with replace_file(target, inputs) as partial:
        # save_file would make a file that only its owner can read.
        partial.write_bytes(save(tensors, metadata))


def read_heldout(path: Path) -> HeldOut:
    """Reads a file that `write_heldout` wrote; raises MptTrtError for any other."""
    try:
        with safe_open(path, framework="np") as file:
            stored = json.loads(file.metadata()[METADATA_KEY])
            texts = {key: stored[key] for key in TEXT_KEYS}
            return HeldOut(file.get_tensor("tokens"), file.get_tensor("hidden"), **texts)
    except FileNotFoundError:
        raise MptTrtError(f"{path}: no such file; make it with compute_reference.py") from None
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise MptTrtError(
            f"{path}: not written by compute_reference.py, or damaged ({error}); "
            "delete it and make it again"
        ) from None
