"""What `/metrics` shows, in Prometheus' text format."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from bytelatent.serving.statistics import Histogram as Durations
    from bytelatent.serving.statistics import Statistics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """
    Args:
        statistics: of the scheduler; None before there is one.
    """

    def __init__(self, statistics: Callable[[], "Statistics | None"]):
        self.registry = CollectorRegistry()
        self._statistics = statistics
        self.requests = Counter(
            "bytelatent_http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "bytelatent_http_request_seconds",
            "Seconds to the end of the answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.open_requests = Gauge(
            "bytelatent_http_open_requests", "Requests that are being answered.", registry=self.registry
        )
        self.registry.register(self)  # pyright: ignore[reportArgumentType]

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks a collector for: the scheduler's numbers, as they are now."""
        found = self._statistics()
        if found is None:
            return
        yield _gauge("slots", "Sequences that are decoded at once at most.", found.slots)
        yield _gauge("busy_slots", "Sequences that are being decoded: the batch.", found.busy)
        yield _gauge("waiting", "Sequences that wait for a slot.", found.waiting)
        yield _gauge("places", "Sequences that may be decoded or wait at most.", found.places)
        yield _gauge("prefix_cache_bytes", "Memory of the states of prompts.", found.cached_bytes)
        yield _counter("jobs", "Prompts that were accepted.", found.requests)
        yield _counter("refused_jobs", "Prompts that were refused, since the queue was full.", found.refused)
        yield _counter("generated_bytes", "Bytes that were generated.", found.bytes)
        yield _counter("generated_patches", "Patches that were generated.", found.patches)
        yield _counter("prompt_bytes", "Bytes of prompts that were read.", found.prefill_bytes)
        yield _counter("reused_prompt_bytes", "Bytes of prompts whose states were in the cache.", found.reused_bytes)
        yield _counter("prefix_cache_lookups", "Prompts that were looked for in the cache.", found.lookups)
        yield _counter("prefix_cache_hits", "Prompts of which the cache had a part.", found.hits)
        ended = CounterMetricFamily("bytelatent_ended", "Sequences by why they ended.", labels=["reason"])
        for reason, count in found.ended.items():
            ended.add_metric([reason], count)
        yield ended
        first, between = found.time_to_first_byte, found.between_bytes
        yield _histogram("time_to_first_byte_seconds", "Seconds from a prompt to its first byte.", first)
        yield _histogram("between_bytes_seconds", "Seconds from a byte to the next.", between)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"bytelatent_{name}", about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"bytelatent_{name}", about, value=value)


def _histogram(name: str, about: str, durations: "Durations") -> Metric:
    from bytelatent.serving.statistics import BOUNDS_S

    cumulated, buckets = 0, []
    for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], durations.counts, strict=True):
        cumulated += count
        buckets.append((bound, cumulated))
    return HistogramMetricFamily(f"bytelatent_{name}", about, buckets=buckets, sum_value=durations.sum_s)
