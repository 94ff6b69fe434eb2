"""Greedy decoding on the CPU: the network under ONNX Runtime against transformers, in one run.

Both run the same random model in float32 with the same number of threads, from the same prompt, in
alternation; the figure is the ratio of the medians. The limit is the rate at which the weights can
be read, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from common import SCRIPTS, measure, script, write_result

sys.path.insert(0, str(SCRIPTS))

PROMPT = list(range(100, 116))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="bench-354m", help="shape (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-decode"))
    arguments = parser.parse_args()
    engine_dir, model_dir = make_engine(arguments.folder, arguments.like)
    ours = OurRuntime(engine_dir, arguments.threads, arguments.tokens)
    peer = Peer(model_dir, arguments.threads, arguments.tokens)
    assert ours.tokens() == peer.tokens(), "the two do not agree"
    rates: dict[str, list[float]] = {"network": [], "transformers": []}
    for _ in range(arguments.repeats):
        rates["network"].append(arguments.tokens / timed(ours.tokens))
        rates["transformers"].append(arguments.tokens / timed(peer.tokens))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    bandwidth = read_bandwidth(arguments.threads)
    limit = bandwidth / weight_bytes(engine_dir)
    figures = {
        "shape": arguments.like,
        "threads": arguments.threads,
        "new_tokens": arguments.tokens,
        "ratio_to_transformers": medians["network"] / medians["transformers"],
        "ratio_to_read_limit": medians["network"] / limit,
        "tokens_per_s": medians,
        "read_limit_tokens_per_s": limit,
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "all_tokens_per_s": rates,
    }
    print(
        f"{medians['network']:.1f} tokens/s: "
        f"{figures['ratio_to_transformers']:.2f} x transformers, "
        f"{figures['ratio_to_read_limit']:.0%} of the read limit"
    )
    print(write_result(f"cpu-decode-{arguments.like}", figures))


def make_engine(folder: Path, like: str) -> tuple[Path, Path]:
    """The float32 engine directory and the checkpoint it was made from; made once."""
    model_dir, ft, engine_dir = folder / "checkpoint", folder / "ft", folder / "engine"
    if not engine_dir.exists():
        shape = ("--like", like, "--dtype", "float32")
        measure(script("make_random_checkpoint.py", *shape, "--output_dir", model_dir))
        measure(script("convert_hf_mpt_to_ft.py", "-i", model_dir, "-o", ft, "-t", "float32"))
        limits = ("--max_input_len", "64", "--max_output_len", "64", "--max_batch_size", "1")
        measure(
            script("build.py", "--model_dir", ft / "1-gpu", "--output_dir", engine_dir, *limits)
        )
    return engine_dir, model_dir


def timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class OurRuntime:
    def __init__(self, engine_dir: Path, threads: int, count: int):
        from mpt_trt.engines.loading import load_engine
        from mpt_trt.generation import GenerationConfig

        self.model = load_engine(engine_dir, "onnxruntime", threads).model
        self.config = GenerationConfig(max_new_tokens=count, end_id=None, pad_id=0)

    def tokens(self) -> list[int]:
        from mpt_trt.generation import generate

        return list(generate(self.model, [PROMPT], self.config)[0][0].tokens)


class Peer:
    """transformers' own generate, with its KV cache on (its MPT configuration has it off)."""

    def __init__(self, model_dir: Path, threads: int, count: int):
        import torch
        from transformers import MptForCausalLM

        torch.set_num_threads(threads)
        self.count = count
        self.model = MptForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def tokens(self) -> list[int]:
        import torch

        prompt = torch.tensor([PROMPT])
        with torch.inference_mode():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.count,
                min_new_tokens=self.count,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(PROMPT) :].tolist()


def read_bandwidth(threads: int) -> float:
    """Bytes a second at which a matrix larger than the caches is read: torch's sum, best of 10."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(1 << 28)
    return values.nbytes / min(timed(values.sum) for _ in range(10))


def weight_bytes(engine_dir: Path) -> int:
    """Bytes that one token reads: every weight once (of the embedding, the head's use)."""
    return sum(path.stat().st_size for path in (engine_dir / "weights").iterdir())


if __name__ == "__main__":
    main()
