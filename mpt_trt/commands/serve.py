"""Serve an engine over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from mpt_trt.api.text import EngineText
from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.logs import set_up_logging
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.scheduling.ranks import follow, lead
from mpt_trt.scheduling.scheduler import Scheduler
from mpt_trt.scheduling.worker import Worker
from mpt_trt.server.app import make_app
from mpt_trt.server.connections import HttpProtocol
from mpt_trt.server.outbox import Outbox
from mpt_trt.server.service import Limits, Service

log = logging.getLogger("serve")

API_KEY = "MPT_TRT_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Idle connections beyond this number are answered with 503.
MOST_CONNECTIONS = 1000


def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    api_key = os.environ.get(API_KEY) or None
    if options.host not in LOOPBACK and api_key is None:
        log.warning(
            "--host %s without %s: everybody who reaches this port can use the engine",
            *(options.host, API_KEY),
        )
    manifest = read_manifest(options.engine_dir)
    text = EngineText.read(
        options.engine_dir, manifest, options.tokenizer_dir, options.chat_template
    )
    text.require_tokenizer()
    engine = open_engine(options)
    ranks = engine.communicator
    if ranks is not None and ranks.rank > 0:
        # Rank 0 answers what runs, and then ends the others.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        follow(engine.model, ranks)
        return
    _serve(options, engine, text, api_key)


def _serve(
    options: argparse.Namespace, engine: LoadedEngine, text: EngineText, api_key: str | None
) -> None:
    """Serves the engine of rank 0, which other ranks follow if there are any."""
    leader = None if engine.communicator is None else lead(engine.model, engine.communicator)
    model = leader or engine.model
    with _listening(options.host, options.port) as listener:
        outbox = Outbox()
        scheduler = Scheduler(model, options.piece_tokens, engine.max_logits, outbox.flush)
        worker = Worker(scheduler, options.on_failure)
        if leader is not None:
            # Ranks cannot go on after a failure, because only one of them may have had it.
            worker = Worker(scheduler, "exit", leader.keep_waiting, leader.idle_seconds)
        limits = Limits(options.max_waiting, options.timeout, options.max_body_bytes)
        worker.start()
        service = Service(
            text, scheduler, worker, outbox, limits, model.capacity, options.served_model_name
        )
        server = _Server(
            uvicorn.Config(
                make_app(service, api_key),
                log_config=None,
                access_log=False,
                http=HttpProtocol,
                ws="none",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=options.drain,
                server_header=False,
            ),
            worker,
        )
        address, port = listener.getsockname()[:2]
        print(f"Runtime: {engine.runtime}", file=sys.stderr)
        print(f"Serving {service.model_name} on http://{address}:{port}", file=sys.stderr)
        # SIGTERM and Ctrl-C arrive again when the server has answered what it was asked.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        worker.stop(is_drained=False)
        worker.join()
    if worker.failure is not None:
        raise MptTrtError(f"the engine failed: {worker.failure}; see the log")
    if leader is not None:
        leader.end()


class _Server(uvicorn.Server):
    """A server that ends with its worker."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    async def on_tick(self, counter: int) -> bool:
        if not self._worker.is_running:
            self.should_exit = True
        return await super().on_tick(counter)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at an address; raises MptTrtError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            reason = error.strerror or error
            raise MptTrtError(f"--host {host} --port {port}: {reason}; choose another") from None
        yield listener
