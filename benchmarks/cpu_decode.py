"""Compares greedy decoding on the CPU under ONNX Runtime with transformers, in one run.

All run one random model with the same number of threads: transformers in float32; the float32
network, which has to give the same tokens; int4_awq with exact activations; and int4_awq with
activations rounded to 8 bits. They alternate in reading prompts of several lengths up to the first
new token, and in decoding. The rate of decoding is that of the tokens after the first. The limit is
the rate at which a network's weights can be read, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common import (
    REPOSITORY,
    make_random_checkpoint,
    measure,
    private_mib,
    script,
    timed,
    weight_bytes,
    write_result,
)

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.system.process import restart_with_huge_pages

PROMPT = 16
READS = 3


@dataclass(frozen=True)
class Contender:
    """A measured network. is_quantized: int4_awq. activations: see `cpu_settings.Activations`."""

    is_quantized: bool = False
    activations: str = "exact"


CONTENDERS = {
    "float32": Contender(),
    "int4_awq": Contender(is_quantized=True),
    "int4_awq, int8 activations": Contender(is_quantized=True, activations="int8"),
}


class Generator(Protocol):
    def tokens(self, length: int, count: int) -> list[int]:
        """Generates `count` new tokens after a prompt of `length` tokens."""
        ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--like", default="bench-354m", help="shape (default: %(default)s)")
    add("--layers", type=int, help="blocks (default: the shape's)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--tokens", type=int, default=48, help="new ones (default: %(default)s)")
    add("--prompts", type=int, nargs="+", default=[64, 512], help="lengths (default: 64 512)")
    add("--repeats", type=int, default=5, help="(default: %(default)s)")
    add("--folder", type=Path, default=Path("build/benchmark-decode"))
    arguments = parser.parse_args()
    name = arguments.like + ("" if arguments.layers is None else f"-{arguments.layers}-layers")
    folder = arguments.folder / name
    make_networks(folder, arguments)
    loaded, load_costs = {}, {}
    for label, contender in CONTENDERS.items():
        loaded[label], load_costs[label] = load(
            lambda contender=contender: OurRuntime(folder, contender, arguments.threads)
        )
    loaded["transformers"], load_costs["transformers"] = load(
        lambda: Peer(folder / "checkpoint", arguments.threads)
    )
    expected = loaded["transformers"].tokens(PROMPT, arguments.tokens)
    if loaded["float32"].tokens(PROMPT, arguments.tokens) != expected:
        raise SystemExit("the float32 network and transformers do not give the same tokens")
    seconds = timings(loaded, arguments)
    figures = {
        "shape": name,
        "threads": arguments.threads,
        "prompt": PROMPT,
        "new_tokens": arguments.tokens,
        **summary(seconds, folder, arguments),
        "loading": load_costs,
        "huge_pages": os.environ.get("GLIBC_TUNABLES", ""),
        "all_seconds": {str(key): values for key, values in seconds.items()},
    }
    show(figures)
    print(write_result(f"cpu-decode-{name}", figures))


# Timed parts of a round: (contender, prompt's length, new tokens), and "read".
Seconds = dict[tuple[str, int, int] | str, list[float]]


def timings(loaded: dict[str, Generator], arguments: argparse.Namespace) -> Seconds:
    """Measures the seconds of every round; the first round is dropped."""
    read = reader(arguments.threads)
    cases = [(PROMPT, 1), (PROMPT, arguments.tokens), *((n, 1) for n in arguments.prompts)]
    seconds: Seconds = {"read": []}
    for round_ in range(arguments.repeats + 1):
        for name, model in loaded.items():
            for length, count in cases:
                spent = timed(lambda m=model, n=length, c=count: m.tokens(n, c))
                if round_:
                    seconds.setdefault((name, length, count), []).append(spent)
            if round_:
                seconds["read"] += [timed(read) for _ in range(READS)]
    return seconds


def summary(seconds: Seconds, folder: Path, arguments: argparse.Namespace) -> dict:
    """Computes medians and their ratios; above 1, the network is faster."""
    median = {key: statistics.median(values) for key, values in seconds.items()}
    names = [*CONTENDERS, "transformers"]
    count = arguments.tokens
    decode = {n: (count - 1) / (median[n, PROMPT, count] - median[n, PROMPT, 1]) for n in names}
    whole = {n: count / median[n, PROMPT, count] for n in names}
    bandwidth = READ_BYTES / median["read"]
    peer = "transformers"
    return {
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "networks": {
            name: {
                "weight_gb": weight_bytes(folder / network_name(contender)) / 1e9,
                "decode_ratio_to_transformers": decode[name] / decode[peer],
                "decode_ratio_to_read_limit": decode[name]
                * weight_bytes(folder / network_name(contender))
                / bandwidth,
                "whole_ratio_to_transformers": whole[name] / whole[peer],
                "prompt_ratio_to_transformers": {
                    n: median[peer, n, 1] / median[name, n, 1] for n in arguments.prompts
                },
            }
            for name, contender in CONTENDERS.items()
        },
        "decode_tokens_per_s": decode,
        "prompt_and_decode_tokens_per_s": whole,
        "prompt_ms": {
            name: {n: 1e3 * median[name, n, 1] for n in (PROMPT, *arguments.prompts)}
            for name in names
        },
    }


def show(figures: dict) -> None:
    for name, found in figures["networks"].items():
        prompts = ", ".join(
            f"{ratio:.2f} x at {n}" for n, ratio in found["prompt_ratio_to_transformers"].items()
        )
        print(
            f"{name}: {figures['decode_tokens_per_s'][name]:.1f} tokens/s, "
            f"{found['decode_ratio_to_transformers']:.2f} x transformers, "
            f"{found['decode_ratio_to_read_limit']:.0%} of the read limit; prompts {prompts}"
        )


# --- models --------------------------------------------------------------------------------------


def make_networks(folder: Path, arguments: argparse.Namespace) -> None:
    """Makes the checkpoint, once, and both networks, without plans, for these prompts."""
    from networks import network_without_plan

    from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
    from mpt_trt.calibration.result import read_calibration
    from mpt_trt.engines.spec import BuildLimits
    from mpt_trt.ft.checkpoint import read_ft_checkpoint
    from mpt_trt.quantization.schemes import Awq, Quantization

    ft, calibration = folder / "ft" / "1-gpu", folder / "awq" / "mpt_tp1_rank0.npz"
    if not calibration.exists():
        checkpoint = folder / "checkpoint"
        make_random_checkpoint(checkpoint, arguments.like, "float32", arguments.layers)
        options = ("-i", checkpoint, "-o", ft.parent, "-t", "float32")
        measure(script("convert_hf_mpt_to_ft.py", *options))
        # Any calibration is good enough for random weights.
        size = ("--calib_size", "1", "--calib_max_seq_length", "32")
        tokenizer = ("--tokenizer_dir", REPOSITORY / "resources" / "mpt-demo")
        source = ("--model_dir", ft, "--qformat", "int4_awq", *size, *tokenizer)
        measure(script("quantize.py", *source, "--export_path", calibration.parent))
    made = read_ft_checkpoint(ft)
    limits = BuildLimits(1, max(arguments.prompts), arguments.tokens)
    for contender in (Contender(), Contender(is_quantized=True)):
        target = folder / network_name(contender)
        shutil.rmtree(target, ignore_errors=True)
        calibrated = CalibratedQuantization(Quantization(None))
        if contender.is_quantized:
            calibrated = CalibratedQuantization(
                Quantization(Awq()), read_calibration(calibration, made)
            )
        network_without_plan(made, target, limits, calibrated)


def network_name(contender: Contender) -> str:
    return "int4_awq" if contender.is_quantized else "float32"


def load(make: Callable[[], Generator]) -> tuple[Generator, dict[str, float]]:
    """Loads a contender; also returns seconds and memory that cannot be reclaimed (RssAnon)."""
    gc.collect()
    before, started = private_mib(os.getpid()), time.perf_counter()
    made = make()
    spent = time.perf_counter() - started
    made.tokens(PROMPT, 1)
    return made, {"seconds": spent, "private_mib": private_mib(os.getpid()) - before}


class OurRuntime:
    def __init__(self, folder: Path, contender: Contender, threads: int):
        from mpt_trt.engines.manifest import read_network_manifest
        from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
        from mpt_trt.engines.onnxruntime.cpu_settings import CpuSettings

        path = folder / network_name(contender)
        cpu = CpuSettings(threads, contender.activations)
        self.model = OnnxRuntimeEngine(path, read_network_manifest(path), cpu)

    def tokens(self, length: int, count: int) -> list[int]:
        from mpt_trt.generation.config import GenerationConfig
        from mpt_trt.generation.generate import generate

        config = GenerationConfig(max_new_tokens=count, end_ids=(), pad_id=0)
        return list(generate(self.model, [prompt(length)], config)[0][0].tokens)


class Peer:
    """transformers' own generate with its KV cache, which its MPT configuration turns off."""

    def __init__(self, model_dir: Path, threads: int):
        import torch
        from transformers import MptForCausalLM

        torch.set_num_threads(threads)
        self.model = MptForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def tokens(self, length: int, count: int) -> list[int]:
        import torch

        ids = torch.tensor([prompt(length)])
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, length:].tolist()


def prompt(length: int) -> list[int]:
    return list(range(100, 100 + length))


# --- the limit -----------------------------------------------------------------------------------

READ_BYTES = 1 << 30


def reader(threads: int) -> Callable[[], object]:
    """Makes a function that reads 1 GiB, far more than the caches hold, with PyTorch's sum."""
    import torch

    torch.set_num_threads(threads)
    return torch.ones(READ_BYTES // 4).sum


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
