"""Records one generation by TensorRT-LLM's C++ runtime in an npz file.

This was written from TensorRT-LLM's source and has never run with it. So it calls only
ModelRunnerCpp.from_dir and generate, as they are in 0.20 to 1.2.1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.system.replace import replace_file

NO_END_TOKEN = -1


@dataclass(frozen=True)
class TrtllmGeneration:
    """One greedy generation by TensorRT-LLM.

    tokens: prompt and continuation. prompt_len: tokens of the prompt. logits: float32 `[len(tokens)
    - prompt_len, vocab]`, from which each token of the continuation was chosen. version: version of
    TensorRT-LLM. compute_capability: that of rank 0's GPU. Speeds are in tokens per second.
    """

    tokens: list[int]
    prompt_len: int
    logits: NDArray[np.float32]
    version: str
    compute_capability: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def record_trtllm_generation(
    engine_dir: Path, prompt: list[int], max_new_tokens: int, version: str, target: Path
) -> None:
    """Continues `prompt` greedily on every rank; rank 0 writes the file `target`.

    The first token gives the speed of prefill, the others the speed of decoding.
    """
    # Only in the environment that has TensorRT-LLM.
    import tensorrt_llm
    import torch
    from tensorrt_llm.runtime import ModelRunnerCpp

    rank = tensorrt_llm.mpi_rank()
    runner = ModelRunnerCpp.from_dir(str(engine_dir), rank=rank, gather_generation_logits=True)
    token_ids = [torch.tensor(prompt, dtype=torch.int32)]

    def generate(new_tokens: int) -> tuple[dict, float]:
        started = time.perf_counter()
        output = runner.generate(
            token_ids,
            max_new_tokens=new_tokens,
            top_k=1,
            end_id=NO_END_TOKEN,
            pad_id=0,
            return_dict=True,
            output_sequence_lengths=True,
            output_generation_logits=True,
        )
        torch.cuda.synchronize()
        return output, time.perf_counter() - started

    generate(max_new_tokens)  # warm-up: the first run includes set-up
    _, first = generate(1)
    output, whole = generate(max_new_tokens)
    if rank == 0:
        major, minor = torch.cuda.get_device_capability()
        generation = _generation(
            output, prompt, (first, whole - first), version, f"{major}.{minor}"
        )
        with replace_file(target) as partial, partial.open("wb") as stream:
            tokens = np.array(generation.tokens, np.int32)
            np.savez(stream, **vars(generation) | {"tokens": tokens})


def _generation(
    output: dict,
    prompt: list[int],
    seconds: tuple[float, float],
    version: str,
    compute_capability: str,
) -> TrtllmGeneration:
    """Makes the record. output: that of ModelRunnerCpp.generate. seconds: prefill and decoding."""
    length = int(output["sequence_lengths"][0, 0])
    new_tokens = length - len(prompt)
    prefill, decode = seconds
    return TrtllmGeneration(
        tokens=output["output_ids"][0, 0, :length].tolist(),
        prompt_len=len(prompt),
        logits=output["generation_logits"][0, 0, :new_tokens].float().cpu().numpy(),
        version=version,
        compute_capability=compute_capability,
        prefill_tokens_per_s=len(prompt) / prefill,
        decode_tokens_per_s=(new_tokens - 1) / max(decode, 1e-9),
    )
