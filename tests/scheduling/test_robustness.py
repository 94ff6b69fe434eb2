"""Many requests from several threads, a third of them cancelled: right answers, no leaks.

MPT_TRT_REQUESTS sets the number of requests; `make robustness` runs 10,000.
"""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpt_trt.engines.load import load_engine
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.scheduling.scheduler import Request, Scheduler
from mpt_trt.scheduling.worker import Worker
from support.checkpoints import CheckpointSpec
from support.demo import build_for_cpu
from support.engines import make_ft_checkpoint

NUM_REQUESTS = int(os.environ.get("MPT_TRT_REQUESTS", "300"))
NUM_CLIENTS = 8
VOCAB, MOST_NEW, MOST_PROMPT = 67, 12, 20
SPEC = CheckpointSpec(hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=2, vocab_size=VOCAB)
LIMITS = BuildLimits(max_batch_size=4, max_input_len=8, max_output_len=24)
# Python and ONNX Runtime keep some memory for later.
MOST_GROWTH_MIB = 24


@dataclass
class Clients:
    """Threads that send requests one after another, and what went wrong."""

    worker: Worker
    answers: dict[tuple[int, ...], tuple[int, ...]]
    complaints: list[str] = field(default_factory=list)
    num_answered: int = 0
    num_cancelled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, num_requests: int, seed: int) -> None:
        per_client = num_requests // NUM_CLIENTS
        threads = [
            threading.Thread(target=self._client, args=(per_client, (seed, number)))
            for number in range(NUM_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, num_requests: int, seed: tuple[int, int]) -> None:
        numbers = np.random.default_rng(seed)
        prompts = list(self.answers)
        for _ in range(num_requests):
            prompt = prompts[numbers.integers(len(prompts))]
            self._ask(prompt, int(numbers.integers(1, MOST_NEW + 1)), numbers)

    def _ask(self, prompt: tuple[int, ...], count: int, numbers: np.random.Generator) -> None:
        ended, begun = threading.Event(), threading.Event()
        tokens: list[int] = []
        errors: list[Exception | None] = []

        def on_token(new) -> None:
            tokens.append(new.token)
            begun.set()

        def on_end(error: Exception | None) -> None:
            errors.append(error)
            ended.set()

        request = Request(prompt, GenerationConfig(count, (), 0), on_token, on_end)
        self.worker.submit(request)
        if numbers.random() < 1 / 3:
            # Some wait or read their prompt when they are cancelled, others generate.
            begun.wait(numbers.choice([0, 0.001, 1]))
            self.worker.cancel(request)
            seen = tuple(tokens)
            is_right = seen == self.answers[prompt][: len(seen)]
        else:
            is_right = ended.wait(60) and errors == [None]
            is_right = is_right and tuple(tokens) == self.answers[prompt][:count]
        with self.lock:
            self.num_answered += ended.is_set()
            self.num_cancelled += not ended.is_set()
            if not is_right:
                self.complaints.append(f"{prompt} x {count}: {tokens}, {errors}")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_many_requests(tmp_path: Path) -> None:
    checkpoint = make_ft_checkpoint(tmp_path, SPEC)
    folder = build_for_cpu(checkpoint, tmp_path / "engine", LIMITS)
    model = load_engine(folder, "onnxruntime", num_threads=1).model
    numbers = np.random.default_rng(0)
    prompts = [
        tuple(numbers.integers(0, VOCAB, numbers.integers(1, MOST_PROMPT + 1)).tolist())
        for _ in range(20)
    ]
    longest = GenerationConfig(MOST_NEW, (), 0)
    answers = {prompt: generate(model, [prompt], longest)[0][0].tokens for prompt in prompts}
    scheduler = Scheduler(model)
    worker = Worker(scheduler)
    worker.start()
    clients = Clients(worker, answers)
    clients.run(NUM_REQUESTS // 3, seed=1)
    before = resident_mib()
    clients.run(NUM_REQUESTS - NUM_REQUESTS // 3, seed=2)
    worker.stop()
    worker.join(60)
    assert clients.complaints == []
    assert not worker.is_running and worker.failure is None
    assert scheduler.is_idle and scheduler.num_running == 0
    assert clients.num_cancelled > NUM_REQUESTS / 6
    assert clients.num_answered > NUM_REQUESTS / 2
    assert resident_mib() - before < MOST_GROWTH_MIB
