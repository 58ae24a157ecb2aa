"""Prometheus metrics (https://prometheus.io/docs/practices/naming). Each server has a registry of its own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from nanohybrid.engine import Completion

if TYPE_CHECKING:
    from nanohybrid.serve.loop import EngineLoop
    from nanohybrid.serve.stream import RequestStream

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Gauges read the state of the loop; everything else is counted when a request ends."""

    def __init__(self, loop: "EngineLoop") -> None:
        self.registry = registry = CollectorRegistry()
        scheduler = loop.engine.scheduler

        def gauge(name: str, text: str, value: object) -> None:
            Gauge(f"nanohybrid_{name}", text, registry=registry).set_function(value)  # type: ignore[arg-type]

        gauge("requests_running", "requests that have a slot", lambda: loop.running)
        gauge(
            "requests_waiting",
            "requests that wait for a slot",
            lambda: max(loop.num_admitted - loop.running, 0),
        )
        gauge("slots_free", "free slots of recurrent state", lambda: scheduler.slots.num_free)
        gauge("slots_total", "slots of recurrent state", lambda: scheduler.slots.size)
        gauge("pages_free", "free pages of keys and values", lambda: scheduler.pages.num_free)
        gauge("pages_total", "pages of keys and values", lambda: scheduler.pages.size)
        registry.register(_Preemptions(loop))
        self._first = Histogram(
            "nanohybrid_time_to_first_token_seconds",
            "from arrival to the first token",
            buckets=FIRST,
            registry=registry,
        )
        self._each = Histogram(
            "nanohybrid_time_per_token_seconds",
            "between tokens, of each request",
            buckets=EACH,
            registry=registry,
        )
        self._queue = Histogram(
            "nanohybrid_queue_seconds", "from arrival to a slot", buckets=FIRST, registry=registry
        )
        self._ends = Counter(
            "nanohybrid_requests", "requests that ended, by reason", ["reason"], registry=registry
        )
        self._thinking = Counter(
            "nanohybrid_thinking_ends", "thinking traces, by how they ended", ["end"], registry=registry
        )
        self._prompt = Counter("nanohybrid_prompt_tokens", "tokens of prompts", registry=registry)
        self._cached = Counter(
            "nanohybrid_cached_tokens", "tokens of prompts found in the prefix cache", registry=registry
        )
        self._cache = Counter(
            "nanohybrid_prefix_cache",
            "requests, by whether the prefix cache had a part of the prompt",
            ["result"],
            registry=registry,
        )
        self._said = Counter("nanohybrid_generated_tokens", "tokens written", registry=registry)
        self._thought = Counter("nanohybrid_reasoning_tokens", "tokens of thinking traces", registry=registry)
        self._refused = Counter(
            "nanohybrid_refused", "requests that were refused, by status", ["status"], registry=registry
        )
        for end in ("natural", "newline", "forced", "none"):
            self._thinking.labels(end)

    def finished(self, stream: "RequestStream", completion: Completion) -> None:
        """Count a request that ended by itself."""
        count = len(completion.token_ids)
        self._ends.labels(completion.finish_reason).inc()
        self._thinking.labels(completion.thinking_end).inc()
        self._prompt.inc(completion.prompt_tokens)
        self._cached.inc(completion.cached_tokens)
        self._cache.labels(
            "hit" if completion.cached_tokens else (completion.cache_miss or "miss").partition(" at ")[0]
        ).inc()
        self._said.inc(count)
        self._thought.inc(completion.thinking_tokens)
        if stream.first_token_time is not None:
            self._first.observe(stream.first_token_time - stream.arrival_time)
            if count > 1:
                self._each.observe((stream.last_token_time - stream.first_token_time) / (count - 1))
        if stream.scheduled_time is not None:
            self._queue.observe(max(stream.scheduled_time - stream.arrival_time, 0.0))

    def refuse(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(str(status)).inc()

    def cancelled(self) -> None:
        """Count a request whose client disconnected."""
        self._ends.labels("cancelled").inc()

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class _Preemptions(Collector):
    """The scheduler's counter of preemptions."""

    def __init__(self, loop: "EngineLoop") -> None:
        self._scheduler = loop.engine.scheduler

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counter."""
        text = "times a running request was preempted since no page was free"
        yield CounterMetricFamily("nanohybrid_preemptions", text, self._scheduler.num_preemptions)
