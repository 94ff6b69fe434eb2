"""Numbers for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from mpt_trt.scheduling.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of a server, in a registry of its own."""

    def __init__(self, scheduler: Scheduler):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mpt_trt_requests", "HTTP requests", ["endpoint", "status"], registry=registry
        )
        self.first_token_s = Histogram(
            "mpt_trt_time_to_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "mpt_trt_time_between_tokens_seconds",
            "Seconds between two tokens of a choice",
            buckets=SECONDS,
            registry=registry,
        )
        running = Gauge("mpt_trt_running", "Choices with a cache row", registry=registry)
        running.set_function(lambda: scheduler.num_running)
        waiting = Gauge("mpt_trt_waiting", "Choices without a cache row", registry=registry)
        waiting.set_function(lambda: scheduler.num_waiting)
        registry.register(_TokenCounters(scheduler))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _TokenCounters(Collector):
    """Token counters that the scheduler itself keeps."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> list[CounterMetricFamily]:
        return [
            CounterMetricFamily(
                "mpt_trt_prompt_tokens", "Prompt tokens read", value=self._scheduler.num_read
            ),
            CounterMetricFamily(
                "mpt_trt_generated_tokens", "Tokens generated", value=self._scheduler.num_generated
            ),
        ]
