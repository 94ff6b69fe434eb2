"""The HTTP server in a thread of the tests, on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from mpt_trt.api.text import EngineText
from mpt_trt.engines.interface import RowModel
from mpt_trt.engines.load import load_engine
from mpt_trt.scheduling.scheduler import Scheduler
from mpt_trt.scheduling.worker import OnFailure, Worker
from mpt_trt.server.app import make_app
from mpt_trt.server.connections import HttpProtocol
from mpt_trt.server.outbox import Outbox
from mpt_trt.server.service import Limits, Service

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    """A running server."""

    port: int
    model: RowModel
    scheduler: Scheduler
    worker: Worker
    service: Service

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_idle(self) -> None:
        """Waits until no request has a row or waits for one."""
        self.wait_for(lambda: self.scheduler.is_idle)

    def wait_for(self, is_true: Callable[[], bool], within_s: float = 20) -> None:
        """Waits until something is true; fails if that takes too long."""
        deadline = time.monotonic() + within_s
        while not is_true():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.002)


@contextlib.contextmanager
def serving(
    engine_dir: Path,
    template: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008
    on_failure: OnFailure = "continue",
    api_key: str | None = None,
) -> Iterator[Served]:
    """Serves an engine while the block runs."""
    engine = load_engine(engine_dir, "onnxruntime", num_threads=1)
    text = EngineText.read(engine_dir, engine.manifest, None, template)
    outbox = Outbox()
    scheduler = Scheduler(engine.model, deliver=outbox.flush)
    worker = Worker(scheduler, on_failure)
    worker.start()
    service = Service(text, scheduler, worker, outbox, limits, engine.model.capacity)
    config = uvicorn.Config(
        make_app(service, api_key), log_config=None, access_log=False, http=HttpProtocol
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        # Clients may connect before the thread has started.
        listener.listen()
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield Served(listener.getsockname()[1], engine.model, scheduler, worker, service)
        finally:
            server.should_exit = True
            thread.join(10)
            worker.stop(is_drained=False)
            worker.join(10)
