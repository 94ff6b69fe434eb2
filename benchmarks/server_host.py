"""Measures the host's part of the server's steps, around a model that only waits.

A step takes as long as one on a GPU and leaves the host free meanwhile. Its logits are random. So
the rest of the time is the server's: choosing tokens, scheduling, texts and HTTP. Clients stream
sampled tokens from another process; each sends the next request when it has an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import uvicorn
from common import REPOSITORY, write_result

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.api.text import EngineText
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.scheduling.scheduler import Scheduler
from mpt_trt.scheduling.worker import Worker
from mpt_trt.server.app import make_app
from mpt_trt.server.outbox import Outbox
from mpt_trt.server.service import Limits, Service

NAME, HOST = "benchmark", "127.0.0.1"
PROMPT = list(range(100, 228))
# Different logits, which all come from the vocabulary of the demo model's tokenizer.
TABLES, TOKENS = 16, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--step_ms", type=float, default=5.57, help="of a full batch (default: %(default)s)")
    add("--row_ms", type=float, default=0.44, help="less for each row fewer (default: %(default)s)")
    add("--prompt_ms", type=float, default=15.0, help="per prompt step (default: %(default)s)")
    add("--clients", type=int, default=8, help="(default: %(default)s)")
    add("--vocab", type=int, default=50432, help="(default: %(default)s)")
    add("--output", type=int, default=128, help="new tokens per request (default: %(default)s)")
    add("--requests", type=int, default=4, help="requests per client (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--settings", type=json.loads, default={}, help="fields of requests, as a JSON object")
    arguments = parser.parse_args()
    model = WaitingModel(arguments)
    port = serve(model, arguments)
    load(port, arguments.clients, 1, arguments)
    rates: dict[int, list[float]] = {1: [], arguments.clients: []}
    for _ in range(arguments.rounds):
        for clients, found in rates.items():
            found.append(load(port, clients, arguments.requests, arguments))
    limit = 1e3 * arguments.clients / arguments.step_ms
    figures = {
        "settings": vars(arguments),
        "tokens_per_s": {str(clients): found for clients, found in rates.items()},
        "ratio_of_rates": [many / one for one, many in zip(*rates.values(), strict=True)],
        "part_of_limit": [rate / limit for rate in rates[arguments.clients]],
        # Of full batches: from the end of a step to the beginning of the next one.
        "between_steps_ms": statistics.median(model.between_steps_ms),
        "cpu_between_steps_ms": statistics.median(model.cpu_between_steps_ms),
    }
    print(json.dumps(figures, indent=1))
    print(write_result("server-host", figures))


class WaitingModel:
    """A `RowModel` without arithmetic, which leaves the host free like one on a GPU."""

    capacity = 512
    max_step_tokens = len(PROMPT)

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self.vocab_size, self.max_batch_size = arguments.vocab, arguments.clients
        shape = (TABLES, arguments.clients, arguments.vocab)
        self._logits = np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)
        self._logits[:, :, TOKENS:] -= 40
        self._work: Callable[[], None] = lambda: None
        self._num_steps = self._last_rows = 0
        self._last_end = self._last_cpu = 0.0
        self.between_steps_ms: list[float] = []
        self.cpu_between_steps_ms: list[float] = []

    def start(self, batch_size: int) -> None: ...

    def select_rows(self, first: int, count: int) -> None: ...

    def copy_row(self, source: int, target: int) -> None: ...

    def reorder(self, rows: np.ndarray) -> None: ...

    def overlap(self, work: Callable[[], None]) -> None:
        self._work = work

    def step(self, input_ids: np.ndarray, _: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        started, cpu = time.perf_counter(), time.thread_time()
        rows = len(input_ids) if input_ids.shape[1] == 1 else 0
        missing = self.max_batch_size - rows
        milliseconds = self._arguments.step_ms - self._arguments.row_ms * missing
        if rows == self._last_rows == self.max_batch_size:
            self.between_steps_ms.append(1e3 * (started - self._last_end))
            self.cpu_between_steps_ms.append(1e3 * (cpu - self._last_cpu))
        self._work()
        end = started + (milliseconds if rows else self._arguments.prompt_ms) / 1e3
        time.sleep(max(0.0, end - time.perf_counter()))
        self._num_steps, self._last_rows = self._num_steps + 1, rows
        self._last_end, self._last_cpu = time.perf_counter(), time.thread_time()
        return self._logits[self._num_steps % TABLES, : len(wanted)]


def serve(model: WaitingModel, arguments: argparse.Namespace) -> int:
    """Serves the model in a thread; returns the port."""
    limits = SimpleNamespace(max_batch_size=arguments.clients)
    spec = SimpleNamespace(limits=limits)
    manifest = SimpleNamespace(model_name=NAME, end_ids=(0,), provenance={}, spec=spec)
    tokenizer = read_tokenizer(REPOSITORY / "resources" / "mpt-demo")
    text = EngineText(manifest, tokenizer)  # type: ignore[arg-type]
    outbox = Outbox()
    scheduler = Scheduler(model, deliver=outbox.flush)
    worker = Worker(scheduler)
    worker.start()
    service = Service(text, scheduler, worker, outbox, Limits(), model.capacity, NAME)
    config = uvicorn.Config(make_app(service, None), log_config=None, access_log=False)
    listener = socket.socket()
    listener.bind((HOST, 0))
    serving = threading.Thread(
        target=uvicorn.Server(config).run, args=([listener],), daemon=True, name="server"
    )
    serving.start()
    return listener.getsockname()[1]


def load(port: int, clients: int, requests: int, arguments: argparse.Namespace) -> float:
    """Sends requests from another process; returns tokens/s."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": arguments.output, "stream": True}
    content = json.dumps({**body, "ignore_eos": True, **arguments.settings}).encode()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(run_clients, (port, content, clients, requests))
    return clients * requests * arguments.output / seconds


def run_clients(port: int, content: bytes, clients: int, requests: int) -> float:
    """Returns the seconds from the first request to the last answer."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        for _ in range(requests):
            writer.write(head.encode() + content)
            await reader.readuntil(b"data: [DONE]\n\n")
            await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()

    async def every() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    started = time.perf_counter()
    asyncio.run(every())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
