"""Compares an engine's predictions of held-out text with the float32 reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpt_trt.engines.load import LoadedEngine
from mpt_trt.engines.manifest import Manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.heldout import HeldOut
from mpt_trt.evaluation.logits import divergence, logits_in_pieces
from mpt_trt.evaluation.quality_result import Estimate, Figures, Size
from mpt_trt.evaluation.reference import Head
from mpt_trt.generation.logits import log_softmax, require_finite
from mpt_trt.system.progress_lines import Advance, no_progress

# Maximum number of float64 log-probabilities in memory.
CHUNK_VALUES = 1 << 21


@dataclass(frozen=True)
class Predictions:
    """Figures of each position, arrays `[windows, length]`; logarithms are natural.

    nats, reference_nats: negative log-probability of the next token. kl: KL(reference || engine).
    is_same: whether both have the same most likely token.
    """

    nats: NDArray[np.float64]
    reference_nats: NDArray[np.float64]
    kl: NDArray[np.float64]
    is_same: NDArray[np.bool_]

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Predictions:
        """Makes arrays to be filled in."""
        return cls(np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, np.bool_))

    def figures(self) -> Figures:
        """Computes means over the windows, with standard errors."""
        nats, reference_nats = estimate(self.nats), estimate(self.reference_nats)
        return Figures(
            nats_per_token=nats,
            perplexity=math.exp(nats.mean),
            reference_nats_per_token=reference_nats,
            reference_perplexity=math.exp(reference_nats.mean),
            excess=estimate(self.nats - self.reference_nats),
            kl=estimate(self.kl),
            top1=estimate(self.is_same),
            windows=len(self.nats),
            tokens=self.nats.size,
        )


def estimate(values: NDArray) -> Estimate:
    """Computes the mean of `[windows, length]` and its standard error over windows.

    Tokens of one window are not independent of each other, but windows nearly are.
    """
    means = values.mean(axis=1, dtype=np.float64)
    error = None if len(means) < 2 else float(means.std(ddof=1) / math.sqrt(len(means)))
    return Estimate(float(means.mean()), error)


def measure(
    engine: LoadedEngine, heldout: HeldOut, head: Head | None, advance: Advance = no_progress
) -> Figures | None:
    """Reads the windows with the engine and compares its predictions with the reference's.

    Every rank takes part. Only rank 0 has the reference's head and returns the figures. advance:
    counts the tokens.

    Raises FloatingPointError when a logit is not finite.
    """
    predictions = Predictions.empty(heldout.inputs.shape)
    numbers = np.arange(heldout.inputs.size).reshape(heldout.inputs.shape)
    for piece in logits_in_pieces(engine, heldout.inputs):
        if head is not None:
            places = numbers[piece.sequences, piece.positions].ravel()
            logits = piece.logits.reshape(len(places), -1)
            for part in _chunks(*logits.shape):
                _compare(logits[part], places[part], heldout, head, predictions)
                advance(len(places[part]))
    return None if head is None else predictions.figures()


def _chunks(num_positions: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_VALUES // vocab_size)
    return (slice(start, start + size) for start in range(0, num_positions, size))


def _compare(
    logits: NDArray[np.float32],
    places: NDArray[np.int64],
    heldout: HeldOut,
    head: Head,
    predictions: Predictions,
) -> None:
    """Fills in the predictions at `places`, `[positions]`, from logits `[positions, vocab]`."""
    hidden = heldout.hidden.reshape(-1, heldout.hidden.shape[-1])[places]
    reference = head.logits(torch.from_numpy(hidden)).numpy()
    log_q = log_softmax(require_finite(logits).astype(np.float64))
    log_p = log_softmax(reference.astype(np.float64))
    target = np.arange(len(places)), heldout.targets.reshape(-1)[places]
    predictions.nats.flat[places] = -log_q[target]
    predictions.reference_nats.flat[places] = -log_p[target]
    predictions.kl.flat[places] = divergence(log_p, log_q)
    predictions.is_same.flat[places] = logits.argmax(axis=-1) == reference.argmax(axis=-1)


def engine_size(engine_dir: Path, manifest: Manifest) -> Size:
    """Bytes on disk of an engine directory: plans, networks, and all files."""
    plans = {rank.engine for rank in manifest.ranks}
    named = {name for rank in manifest.ranks for name in rank.files}
    everything = {str(path.relative_to(engine_dir)) for path in engine_dir.rglob("*")}
    return Size(
        plans=_disk(engine_dir, plans),
        networks=_disk(engine_dir, named - plans),
        total=_disk(engine_dir, everything),
    )


def _disk(folder: Path, names: set[str]) -> int:
    """Bytes of the named files without directories; a file with two names counts once."""
    paths = [folder / name for name in names]
    stats = [path.stat() for path in paths if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def require_same_model(engine_dir: Path, manifest: Manifest, heldout: HeldOut, head: Head) -> None:
    """Raises MptTrtError when the engine and its reference have different sizes."""
    of_engine = manifest.spec.config.vocab_size, manifest.spec.config.hidden_size
    of_reference = head.weight.shape[0], heldout.hidden.shape[-1]
    if of_reference != of_engine or head.weight.shape[1] != of_engine[1]:
        raise MptTrtError(
            f"{engine_dir}: vocabulary and hidden size are {of_engine}, but those of the checkpoint"
            f" and its reference are {of_reference}; they belong to different models"
        )
