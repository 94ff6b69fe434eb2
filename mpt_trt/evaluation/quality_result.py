"""Result file of a quality measurement, `quality/{model}/{variant}/{tp}-gpu.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mpt_trt.evaluation.measured_engine import MeasuredEngine
from mpt_trt.evaluation.result_file import read_result
from mpt_trt.evaluation.speed import Speed
from mpt_trt.system.files import write_json


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error, which is None for a single window."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Figures:
    """Figures of an engine's predictions of held-out text; logarithms are natural (nats).

    nats_per_token: mean negative log-probability of the next token. perplexity: its exponential.
    reference_...: the same for the reference. excess: nats per token more than the reference needs;
    most of the variation between windows cancels in this paired difference. kl: mean KL(reference
    || engine) of the next-token distributions. top1: share of positions with the same most likely
    token. windows, tokens: numbers of measured windows and tokens.
    """

    nats_per_token: Estimate
    perplexity: float
    reference_nats_per_token: Estimate
    reference_perplexity: float
    excess: Estimate
    kl: Estimate
    top1: Estimate
    windows: int
    tokens: int


@dataclass(frozen=True)
class Size:
    """Bytes on disk of all ranks; shared files and hard links count once.

    plans: TensorRT's files. networks: graphs and weights, from which plans are built and which ONNX
    Runtime loads. total: every file in the directory.
    """

    plans: int
    networks: int
    total: int


@dataclass(frozen=True)
class WholeText:
    """Predictions of a whole text, in windows that together predict every token once.

    word_perplexity, byte_perplexity: exponentials of the nats per word and per UTF-8 byte, which do
    not depend on the tokenizer; None beyond the largest floating-point number, as when a long text
    is one word. bits_per_byte: the base-2 logarithm of the latter. nats: negative
    log-probability of the text. window_length: most tokens that the model reads at a time.
    """

    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float
    nats: float
    tokens: int
    words: int
    bytes: int
    window_length: int


@dataclass(frozen=True, kw_only=True)
class QualityResult(MeasuredEngine):
    """Quality, size and speed of one engine.

    reference: the software that computed the reference. text: file name. window_length: tokens per
    window. speed: measured on one sequence of prompt_len tokens and new_tokens generated tokens.
    throughput: the same of throughput_rows sequences at a time, all of them together. whole_text:
    the same text as a whole; None if it was not measured. tasks: metrics of lm-eval's tasks, by the
    task's name.
    """

    reference: str
    text: str
    text_hash: str
    window_length: int
    figures: Figures
    size: Size
    speed: Speed
    throughput: Speed
    throughput_rows: int
    prompt_len: int
    new_tokens: int
    whole_text: WholeText | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def write_quality(result: QualityResult, target: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the result as JSON. inputs: see `replace_file`."""
    write_json(target, asdict(result), inputs)


def read_quality(path: Path) -> QualityResult:
    """Reads a result; raises MptTrtError when `write_quality` did not write the file."""
    return read_result(path, QualityResult, "a quality measurement")
