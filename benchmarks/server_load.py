"""Puts serve.py under load with guidellm: several clients against one request after another.

Rounds alternate between the two, and transformers' `generate` of the same model with the same
numbers of tokens, one prompt after another. guidellm needs packages of its own: install it in an
environment, and name its command with --guidellm. Requests have random text as prompts and ignore
end tokens, so all have the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common import REPOSITORY, make_random_checkpoint, measure, script, write_result

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.build.assemble import write_manifest
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.rank_descriptions import engine_name, read_network_hash, write_plan_description
from mpt_trt.engines.spec import BuilderInfo, BuildLimits
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.system.files import content_hash

DEMO = REPOSITORY / "resources" / "mpt-demo"
SCHEMES = {"none": None, "int8": WeightOnly(8), "int4": WeightOnly(4, 128)}
NAME = "benchmark"
START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--guidellm", default="guidellm", help="its command line (default: %(default)s)")
    add("--like", help="shape of a random model (default: the demo model)")
    add("--dtype", default="float32", help="(default: %(default)s)")
    add("--scheme", choices=SCHEMES, default="none", help="weights (default: %(default)s)")
    add("--clients", type=int, default=8, help="(default: %(default)s)")
    add("--prompt", type=int, default=64, help="tokens per prompt (default: %(default)s)")
    add("--output", type=int, default=64, help="new tokens per request (default: %(default)s)")
    add("--requests", type=int, default=40, help="requests per client (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--num_threads", default="0", help="of the engine on a CPU (default: %(default)s, all)")
    add("--no_peer", action="store_true", help="without transformers")
    add("--folder", type=Path, default=Path("build/benchmark-server"))
    arguments = parser.parse_args()
    model_dir = make_checkpoint(arguments)
    engine_dir = make_engine(model_dir, arguments)
    ways: dict[str, Callable[[], dict[str, float]]] = {}
    with serving(engine_dir, arguments) as (url, runtime, pid):
        # Kernels are chosen and CUDA graphs captured when a number of rows occurs first.
        for clients in (1, arguments.clients):
            load(url, pid, clients, arguments)
        ways["one after another"] = lambda: load(url, pid, 1, arguments)
        ways[f"{arguments.clients} clients"] = lambda: load(url, pid, arguments.clients, arguments)
        if not arguments.no_peer:
            peer = Peer(model_dir, arguments)
            ways["transformers"] = peer.measure
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, run in ways.items():
                measured[way].append(run())
                print(way, measured[way][-1], flush=True)
    figures = summary(measured, arguments) | {"runtime": runtime}
    print(json.dumps(figures, indent=1))
    shape = "-".join((arguments.like or "mpt-demo", arguments.dtype, arguments.scheme))
    print(write_result(f"server-load-{shape}", figures))


def summary(measured: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> dict:
    medians = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for way, runs in measured.items()
    }
    rates = {way: [run["tokens_per_s"] for run in runs] for way, runs in measured.items()}
    many = f"{arguments.clients} clients"
    return {
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.output,
        "requests_per_client": arguments.requests,
        "clients": arguments.clients,
        # Ratios of rounds, in which other work slows down all ways alike.
        "ratio_of_rates": {
            way: [a / b for a, b in zip(rates[many], rates[way], strict=True)] for way in rates
        },
        "medians": medians,
        "all": measured,
    }


# --- the engine ----------------------------------------------------------------------------------


def make_checkpoint(arguments: argparse.Namespace) -> Path:
    if arguments.like is None:
        return DEMO
    target = arguments.folder / "checkpoint"
    if not target.exists():
        make_random_checkpoint(target, arguments.like, arguments.dtype)
    return target


def make_engine(model_dir: Path, arguments: argparse.Namespace) -> Path:
    """Makes an engine directory without a plan, which ONNX Runtime runs, once."""
    ft = arguments.folder / f"ft-{arguments.dtype}"
    if not ft.exists():
        options = ("-i", model_dir, "-o", ft, "-t", arguments.dtype)
        measure(script("convert_hf_mpt_to_ft.py", *options))
    target = arguments.folder / f"engine-{arguments.dtype}-{arguments.scheme}-{arguments.clients}"
    if target.exists():
        return target
    target.mkdir()
    # guidellm's prompts can be a few tokens longer than requested.
    limits = BuildLimits(arguments.clients, arguments.prompt + 32, arguments.output)
    calibrated = CalibratedQuantization(Quantization(SCHEMES[arguments.scheme]))
    checkpoint = read_ft_checkpoint(ft / "1-gpu")
    write_networks(NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated), target)
    plan = target / engine_name(0)
    plan.write_bytes(b"no plan")
    builder = BuilderInfo("tensorrt_rtx", "0", ("0.0",))
    write_plan_description(plan, content_hash(plan), read_network_hash(target, 0), builder)
    write_manifest(target, [(target, target)])
    return target


@contextmanager
def serving(engine_dir: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Runs serve.py; yields its address, its runtime and its process."""
    options = ("--engine_dir", engine_dir, "--tokenizer_dir", DEMO, "--port", "0")
    more = ("--served_model_name", NAME, "--runtime", "onnxruntime", "--trust")
    threads = ("--num_threads", arguments.num_threads)
    command = [str(word) for word in script("serve.py", *options, *more, *threads)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield (*_address(process, log), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _address(process: subprocess.Popen, log) -> tuple[str, str]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        log.seek(0)
        text = log.read()
        if found := re.search(r"on (http://\S+)", text):
            runtime = re.search("Runtime: (.*)", text)
            return found[1], runtime[1] if runtime else ""
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the server did not start:\n{log.read()}")


# --- the load ------------------------------------------------------------------------------------


def load(url: str, pid: int, clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Sends requests with guidellm; each client sends the next one when it has an answer.

    pid: the server's process.
    """
    before = cpu_seconds(pid)
    sizes = f"prompt_tokens={arguments.prompt},output_tokens={arguments.output}"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = {
            "backend": f"kind=openai_http,target={url},model={NAME},"
            "request_format=/v1/completions,http2=false",
            "profile": f"kind=concurrent,streams={clients}",
            "constraint": f"kind=max_requests,count={arguments.requests * clients}",
            "tokenizer": f"kind=hf_auto,model={DEMO}",
            "data": f"kind=synthetic_text,{sizes}",
            "output": f"kind=json,path={report}",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        command = [*shlex.split(arguments.guidellm), "run", *words, "--disable-console"]
        finished = subprocess.run(command, capture_output=True, text=True, env=_offline())
        if finished.returncode or not report.exists():
            raise RuntimeError(f"guidellm failed:\n{finished.stdout}\n{finished.stderr}")
        figures = figures_of(json.loads(report.read_text()), arguments)
        tokens = figures["requests"] * arguments.output
        return figures | {"server_cpu_ms_per_token": 1e3 * (cpu_seconds(pid) - before) / tokens}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, which other programs hardly change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "GUIDELLM__LOGGING__DISABLED": "true"}


def figures_of(report: dict, arguments: argparse.Namespace) -> dict[str, float]:
    """Picks rates and times from guidellm's report; every request must have all its tokens."""
    [benchmark] = report["benchmarks"]
    requests = benchmark["requests"]
    answered = requests["successful"]
    if requests["errored"] or requests["incomplete"] or not answered:
        raise RuntimeError(f"requests failed: {str(requests['errored'][:1])[:2000]}")
    if {each["output_tokens"] for each in answered} != {arguments.output}:
        raise RuntimeError("requests have other numbers of tokens than requested")
    started = min(each["request_start_time"] for each in answered)
    ended = max(each["request_end_time"] for each in answered)
    firsts = [each["time_to_first_token_ms"] for each in answered]
    gaps = [each["inter_token_latency_ms"] for each in answered]
    return {
        "tokens_per_s": len(answered) * arguments.output / (ended - started),
        "first_token_ms": statistics.median(firsts),
        "between_tokens_ms": statistics.median(gaps),
        "requests": len(answered),
    }


class Peer:
    """transformers' `generate`, one prompt after another, on the GPU if there is one."""

    def __init__(self, model_dir: Path, arguments: argparse.Namespace):
        import torch
        from transformers import MptForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, arguments.dtype)
        model = MptForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        self._model, self._arguments = model.to(self._device), arguments
        self._generate()

    def measure(self) -> dict[str, float]:
        started = time.perf_counter()
        count = max(1, self._arguments.requests // 4)
        for _ in range(count):
            self._generate()
        seconds = time.perf_counter() - started
        return {"tokens_per_s": count * self._arguments.output / seconds, "requests": count}

    def _generate(self) -> None:
        import torch

        ids = torch.arange(100, 100 + self._arguments.prompt, device=self._device)[None]
        count = self._arguments.output
        with torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        if found.shape[1] != ids.shape[1] + count:
            raise RuntimeError("transformers generated another number of tokens")
        found.cpu()


if __name__ == "__main__":
    main()
