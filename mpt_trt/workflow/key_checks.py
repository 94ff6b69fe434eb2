"""Checks values of the configuration against a model or a builder, by the names of their keys.

Each function raises MptTrtError. The steps make the same checks, but only after earlier work.
"""

from __future__ import annotations

from pathlib import Path

from mpt_trt.checkpoint.source import is_hub_id
from mpt_trt.checkpoint.tokenizer_files import VOCABULARY_FILES, has_tokenizer
from mpt_trt.engines.compute_capabilities import require_buildable, require_fp8_support
from mpt_trt.engines.spec import TENSORRT_LLM, TENSORRT_RTX
from mpt_trt.engines.tensorrt.packages import Package
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.quantization.mixed import require_budget
from mpt_trt.quantization.schemes import Mixed
from mpt_trt.workflow.settings import Settings, Variant


def require_capable_gpus(name: str, variant: Variant, package: Package) -> None:
    """Checks `variants.{name}.compute_capabilities`. package: the builder."""
    if package.module != TENSORRT_RTX or variant.backend == TENSORRT_LLM:
        return
    field = f"variants.{name}.compute_capabilities"
    require_buildable(package, variant.compute_capabilities, field)
    require_fp8_support(variant.compute_capabilities, variant.quantized, field)


def require_tokenizer(name: str, given: str | None, folder: Path) -> None:
    """Checks that `models.{name}.tokenizer` has a tokenizer, if it is on disk.

    given: value of the key. folder: folder that is searched for the tokenizer.
    """
    key = f"models.{name}.tokenizer"
    if given is not None and is_hub_id(given):
        return
    if not folder.is_dir():
        if given is None:
            return  # a hub model that is not fetched yet
        raise MptTrtError(f"{key} = {given}: no such folder, and not a hub id (owner/name)")
    if not has_tokenizer(folder):
        remedy = f"set {key}" if given is None else f"correct {key}"
        raise MptTrtError(
            f"{folder}: no tokenizer there ({', '.join(VOCABULARY_FILES)}); {remedy} to a folder "
            "or a hub id that has one"
        )


def require_cache_fits(name: str, variant: Variant, config: MptConfig) -> None:
    """Checks `variants.{name}.max_input_len` and `max_output_len` against the model's positions."""
    cache_len, positions = variant.max_input_len + variant.max_output_len, config.max_positions
    if positions is not None and cache_len > positions:
        raise MptTrtError(
            f"variants.{name}.max_input_len + max_output_len = {cache_len}, but the model has "
            f"positions for {positions} tokens; lower them"
        )


def require_enough_bits(name: str, variant: Variant, config: MptConfig) -> None:
    """Checks `variants.{name}.quantization.bits` against the model's smallest formats."""
    if not isinstance(variant.quantization, Mixed):
        return
    try:
        require_budget(config, variant.quantization.bits)
    except MptTrtError as error:
        raise MptTrtError(f"variants.{name}.quantization.{error}") from None


def require_length_fits(key: str, length: int, config: MptConfig) -> None:
    """Checks the length of sequences that the float32 model reads."""
    if config.max_positions is not None and length > config.max_positions:
        raise MptTrtError(
            f"{key} = {length}, but the model has positions for {config.max_positions} tokens; "
            "lower it"
        )


def require_smoke_test_fits(settings: Settings, name: str, variant: Variant) -> None:
    """Checks `smoke_test.max_new_tokens` against a row of the engine's cache."""
    new_tokens = settings.smoke_test.max_new_tokens
    cache_len = variant.max_input_len + variant.max_output_len
    if new_tokens >= cache_len:
        raise MptTrtError(
            f"smoke_test.max_new_tokens = {new_tokens}, but a row of the engine's cache holds "
            f"{cache_len} tokens with the prompt (variants.{name}.max_input_len + max_output_len)"
        )


def require_file(key: str, value: str, path: Path) -> None:
    """Checks a key that names a text file."""
    if not path.is_file():
        kind = "not a file" if path.exists() else "no such file"
        raise MptTrtError(f"{key} = {value}: {kind}")
