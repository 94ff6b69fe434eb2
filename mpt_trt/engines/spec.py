"""The largest inputs of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.errors import MptTrtError

TENSORRT_LLM = "tensorrt_llm"
"""The backend whose engines TensorRT-LLM builds from a checkpoint in its own format."""
BACKENDS = ("tensorrt", "tensorrt_rtx", TENSORRT_LLM)


@dataclass(frozen=True)
class BuildLimits:
    """The largest inputs of an engine.

    max_batch_size: rows of the KV cache (prompts times beams).
    max_input_len: tokens a row takes in one step; longer prompts are fed in pieces.
    max_output_len: cache positions a row has beyond max_input_len.
    gather_all_token_logits: logits of every token of a step can be asked for, not only of one
        token a row.
    """

    max_batch_size: int
    max_input_len: int
    max_output_len: int
    gather_all_token_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_output_len"):
            if getattr(self, name) < 1:
                raise MptTrtError(f"{name} = {getattr(self, name)}: at least 1 is required")

    def require_rows(self, batch_size: int) -> None:
        """Raises MptTrtError when the KV cache cannot have that many rows."""
        if batch_size > self.max_batch_size:
            raise MptTrtError(
                f"{batch_size} rows are asked for, but the engine was built for max_batch_size = "
                f"{self.max_batch_size}; build it for more, or ask for fewer prompts or beams"
            )

    def require_window(self, length: int) -> None:
        """Raises MptTrtError when a row of the KV cache cannot hold that many tokens."""
        if length > self.cache_len:
            raise MptTrtError(
                f"window_length = {length}, but a row of the engine's cache holds {self.cache_len} "
                "tokens (max_input_len + max_output_len); lower quality.window_length or raise the "
                "limits"
            )

    @property
    def cache_len(self) -> int:
        """Cache positions of a row: its longest prompt in one step and the longest output."""
        return self.max_input_len + self.max_output_len

    @property
    def max_logits(self) -> int:
        """Most logit rows of one step."""
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
