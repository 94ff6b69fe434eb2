"""Facts about the demo model, computed by transformers and by lm-eval's own model of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, MptForCausalLM

from mpt_trt.system.replace import replace_file
from tools.demo_tasks import write_tasks

WINDOW = 512
"""Tokens per window of the perplexities: no more than fit the cache of every engine."""
PROMPT, NUM_NEW = "def fibonacci", 16
FP32, FP16 = {"dtype": "float32"}, {"dtype": "float16"}
INT8 = {"dtype": "float16", "method": "int8_weight_only"}
FLOAT32_REASON = "float32 sums in another order differ by less than 1e-5; ten times that."
FLOAT16_REASON = (
    "float16 activations changed log-probabilities of this model by 0.0014; seven times that."
)
TASK_METRICS = {
    "mpt_demo_text": ("word_perplexity", "bits_per_byte"),
    "mpt_demo_choice": ("acc", "acc_norm"),
    "mpt_demo_word": ("exact_match,first_word",),
}


def run(options: argparse.Namespace) -> None:
    folder = options.model_dir
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    write_tasks(heldout, folder / "tasks")
    content = {"facts": demo_facts(folder, heldout)}
    with replace_file(folder / "facts.json") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def demo_facts(folder: Path, heldout: str) -> list[dict[str, Any]]:
    """Computes all facts. folder: of the model. heldout: its held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = MptForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    # More threads wait for each other in a model this small, and add in another order.
    torch.set_num_threads(1)
    with torch.inference_mode():
        return [
            *_prompt_facts(model, tokenizer),
            *_text_facts(model, tokenizer, heldout),
            *_task_facts(folder),
        ]


def _prompt_facts(model: nn.Module, tokenizer: Any) -> Iterator[dict[str, Any]]:
    prompt = tokenizer(PROMPT)["input_ids"]
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    tokens = generated[0, len(prompt) :].tolist()
    log_probs = _log_probs(model, [*prompt, *tokens])
    source = f"transformers {transformers.__version__}, MptForCausalLM in float32"
    ids = {"prompt_tokens": prompt, "tokens": tokens}
    yield {
        "kind": "prompt_tokens",
        "name": "token ids of the prompt",
        "source": f"transformers {transformers.__version__}, AutoTokenizer",
        "engine": FP32,
        "tolerance": 0,
        "reason": "Token ids are integers.",
        "prompt": PROMPT,
        "tokens": prompt,
    }
    yield {
        "kind": "text",
        "name": "greedy text",
        "source": source,
        "engine": FP32,
        "tolerance": 0,
        "reason": "Greedy text is the same unless two tokens are equally likely within float32's "
        "rounding.",
        "prompt": PROMPT,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "max_new_tokens": NUM_NEW,
    }
    fp32 = {"source": source, "engine": FP32, "tolerance": 1e-4, "reason": FLOAT32_REASON}
    fp16 = {"source": source, "engine": FP16, "tolerance": 0.01, "reason": FLOAT16_REASON}
    int8 = fp16 | {"engine": INT8, "source": f"{source}, of weights rounded to 8 bits"}
    yield {"kind": "greedy_tokens", "name": "greedy tokens, float32", **fp32, **ids}
    yield _log_probs_fact("log-probabilities, float32", fp32, ids, log_probs)
    yield {"kind": "greedy_tokens", "name": "greedy tokens, float16", **fp16, **ids}
    yield _log_probs_fact("log-probabilities, float16", fp16, ids, log_probs)
    with rounded_to_int8(model):
        rounded = _log_probs(model, [*prompt, *tokens])
    yield _log_probs_fact("log-probabilities, 8-bit weights", int8, ids, rounded)


def _log_probs_fact(
    name: str, common: dict[str, Any], ids: dict[str, list[int]], log_probs: list[float]
) -> dict[str, Any]:
    count = len(ids["prompt_tokens"]) - 1
    return {
        "kind": "log_probs",
        "name": name,
        **common,
        **ids,
        "prompt_log_probs": log_probs[:count],
        "log_probs": log_probs[count:],
    }


def _text_facts(model: nn.Module, tokenizer: Any, heldout: str) -> Iterator[dict[str, Any]]:
    plain = text_scores(model, tokenizer, heldout)
    with rounded_to_int8(model):
        rounded = text_scores(model, tokenizer, heldout)
    source = (
        f"transformers {transformers.__version__}, MptForCausalLM in float32, in windows of "
        f"{WINDOW} tokens like lm-eval's"
    )
    common = {"source": source, "text": "heldout.txt", "window_length": WINDOW}
    for metric, tolerance in (("word_perplexity", 0.05), ("bits_per_byte", 1e-5)):
        yield {
            "kind": "score",
            "name": f"{metric} of heldout.txt, float32",
            "engine": FP32,
            **common,
            "metric": metric,
            "value": plain[metric],
            "tolerance": tolerance,
            "reason": "float32 sums in another order change nats per token by less than 1e-6.",
        }
    yield {
        "kind": "score_difference",
        "name": "bits_per_byte that 8-bit weights add to heldout.txt",
        "engine": INT8,
        "base": FP16,
        **common,
        "metric": "bits_per_byte",
        "value": rounded["bits_per_byte"] - plain["bits_per_byte"],
        "tolerance": 1e-4,
        "reason": "Engines with the same rounding were within 1e-6; a wrong one need not be beyond "
        "this.",
    }


def _task_facts(folder: Path) -> Iterator[dict[str, Any]]:
    """Scores of lm-eval's own `hf` model, which needs lm_eval, accelerate and peft."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from mpt_trt.harness.tasks import run_tasks

    model = HFLM(
        str(folder),
        dtype="float32",
        device="cpu",
        batch_size=8,
        max_length=WINDOW,
        logits_cache=False,
    )
    scores = run_tasks(model, list(TASK_METRICS), folder / "tasks")
    for task, metrics in TASK_METRICS.items():
        for metric in metrics:
            value = scores[task][metric]
            yield {
                "kind": "score",
                "name": f"{metric} of task {task}, float32",
                "source": f"lm-eval {lm_eval.__version__}, model hf in float32",
                "engine": FP32,
                "task": task,
                "task_dir": "tasks",
                "window_length": WINDOW,
                "metric": metric,
                "value": value,
                "tolerance": 1e-5 * value if task == "mpt_demo_text" else 1e-6,
                "reason": "float32 sums in another order."
                if task == "mpt_demo_text"
                else "The same answers give the same score.",
            }


def text_scores(model: nn.Module, tokenizer: Any, text: str) -> dict[str, float]:
    """Word perplexity and bits per byte, in windows that predict every token once."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    nats = 0.0
    for start in range(0, len(tokens), WINDOW):
        stop = min(start + WINDOW, len(tokens))
        # The last window begins earlier, so that it is as long as the others.
        first = stop - WINDOW - 1 if start else 0
        window = tokens[first:stop] if start else [tokenizer.bos_token_id, *tokens[:stop]]
        nats -= sum(_log_probs(model, window)[-(stop - start) :])
    words, size = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "word_perplexity": math.exp(nats / words),
        "bits_per_byte": nats / size / math.log(2),
    }


def _log_probs(model: nn.Module, tokens: list[int]) -> list[float]:
    """Log-probability of every token after the first."""
    logits = model(torch.tensor([tokens[:-1]])).logits[0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return log_probs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()


@contextlib.contextmanager
def rounded_to_int8(model: nn.Module) -> Iterator[None]:
    """Rounds the matrices of the blocks to 8-bit integers with one scale per output feature.

    Scales are float16, as an engine in float16 stores them.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".blocks." in f".{name}."
    ]
    before = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = _to_int8(layer.weight.data)
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data = weight


def _to_int8(weight: Tensor) -> Tensor:
    """Rounds `[out_features, in_features]`; half goes away from zero; amax saturates."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 128
    scaled = weight / scale
    integers = (scaled.abs() + 0.5).floor() * scaled.sign()
    return integers.clamp(-128, 127) * scale.half().float()
