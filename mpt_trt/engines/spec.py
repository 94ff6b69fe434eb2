"""Properties of an engine, and the builder of its plans."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import ELEMENT_BYTES
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import UNQUANTIZED, Quantization, WeightQuantization

TENSORRT_LLM = "tensorrt_llm"
"""Backend whose engines TensorRT-LLM builds from a checkpoint in its own format."""
TENSORRT_RTX = "tensorrt_rtx"
"""Backend that builds plans for given compute capabilities, without a GPU."""
BACKENDS = ("tensorrt", TENSORRT_RTX, TENSORRT_LLM)

RUNTIMES = ("auto", "tensorrt", "onnxruntime")
"""Runtimes to choose from; auto prefers TensorRT."""

MOST = {"max_batch_size": 1 << 16, "max_input_len": 1 << 24, "max_output_len": 1 << 24}


@dataclass(frozen=True)
class BuildLimits:
    """Maximum sizes of an engine's inputs.

    max_batch_size: rows of the KV cache (prompts x beams).
    max_input_len: tokens per row and step; longer prompts are fed in pieces.
    max_output_len: cache positions per row in addition to max_input_len.
    gather_all_token_logits: a step can return the logits of every token instead of one per row.
    """

    max_batch_size: int
    max_input_len: int
    max_output_len: int
    gather_all_token_logits: bool = False

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if (value := getattr(self, name)) < 1:
                raise MptTrtError(f"{name} = {value}: at least 1 is required")
            if value > most:
                raise MptTrtError(f"{name} = {value}: at most {most} is supported")

    def require_rows(self, batch_size: int) -> None:
        """Raises MptTrtError when the KV cache has fewer than `batch_size` rows."""
        if batch_size > self.max_batch_size:
            raise MptTrtError(
                f"{batch_size} rows are requested, but the engine was built for max_batch_size = "
                f"{self.max_batch_size}; build it for more, or use fewer prompts or beams"
            )

    def require_window(self, length: int) -> None:
        """Raises MptTrtError when a row of the KV cache has fewer than `length` positions."""
        if length > self.cache_len:
            raise MptTrtError(
                f"window_length = {length}, but a row of the engine's cache holds {self.cache_len} "
                "tokens (max_input_len + max_output_len); lower quality.window_length or raise the "
                "limits"
            )

    @property
    def cache_len(self) -> int:
        """Cache positions per row: max_input_len + max_output_len."""
        return self.max_input_len + self.max_output_len

    @property
    def max_logits(self) -> int:
        """Maximum number of logit rows that one step returns."""
        tokens = self.max_input_len if self.gather_all_token_logits else 1
        return self.max_batch_size * tokens


@dataclass(frozen=True)
class BuilderInfo:
    """The builder of a plan, and the GPUs that it runs on.

    package: `tensorrt` or `tensorrt_rtx`. compute_capabilities: as "8.9".
    """

    package: str
    version: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class EngineSpec:
    """Properties of an engine. dtype: float32, float16 or bfloat16.

    Raises MptTrtError with the valid sizes when tp_size does not divide the model.
    """

    config: MptConfig
    dtype: str
    tp_size: int
    limits: BuildLimits
    vocabulary: VocabularySharding
    quantization: Quantization = UNQUANTIZED

    def __post_init__(self) -> None:
        sharding.require_legal(self.config, self.tp_size)

    @property
    def scheme(self) -> WeightQuantization | None:
        """Quantization of the weights."""
        return self.quantization.scheme

    @property
    def element_bytes(self) -> int:
        """Size of an unquantized element."""
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class BuilderChoice:
    """The builder of an engine's plans and the GPUs that it builds for.

    backend: `auto` or one of BACKENDS. compute_capabilities: as "8.9".
    """

    backend: str
    compute_capabilities: tuple[str, ...]
