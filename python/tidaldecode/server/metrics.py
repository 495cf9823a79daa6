"""Counters for whoever watches the server: Prometheus' text form, under vLLM's names where it has
the same thing.

Counting is on the way of every token, so it is a few additions; everything else is done when
somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tidaldecode.server.answer import Answer, Delta

if TYPE_CHECKING:
    from tidaldecode.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LONG = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5)) + (1e6,)

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request's submission to its first token.", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Its mean over an answer.", _BETWEEN),
    "e2e_request_latency_seconds": ("From a request's submission to its end.", _LONG),
    "request_queue_time_seconds": ("Until a request's prompt began to be read.", _LONG),
    "request_prefill_time_seconds": ("From then to its first token.", _LONG),
    "request_decode_time_seconds": ("From its first token to its last.", _LONG),
    "request_prompt_tokens": ("Tokens of prompts.", _TOKENS),
    "request_generation_tokens": ("Tokens of answers.", _TOKENS),
}
_SUCCESS = "request_success"
_REJECTED = "admission_rejections"


class _Histogram:
    """Counts by bucket, and the sum of what was counted."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def shown(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulated counts by upper bound, and the sum."""
        total, rows = 0, []
        bounds = [*map(str, self._bounds), "+Inf"]
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows, self._sum


class Metrics:
    """What has happened since the start."""

    def __init__(self, service: Service) -> None:
        """Counts for a service."""
        self._service = service
        self._histograms = {name: _Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._between = self._histograms["inter_token_latency_seconds"]
        self._finished: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._num_slow = 0
        self._num_gone = 0
        self._drafted = 0
        self._accepted = 0
        self._bytes_read = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    # What is counted

    def hear(self, answer: Answer, delta: Delta) -> None:
        """Counts what has come of an answer."""
        answer.has_begun = True
        if delta.token_ids:
            now = time.monotonic()
            if answer.last_token_at:
                # Tokens that come together have shared the time.
                each = (now - answer.last_token_at) / len(delta.token_ids)
                for _ in delta.token_ids:
                    self._between.add(each)
            else:
                answer.first_token_at = now
                since = now - answer.submitted_at
                self._histograms["time_to_first_token_seconds"].add(since)
                for _ in delta.token_ids[1:]:
                    self._between.add(0.0)
            answer.last_token_at = now
        if delta.result is not None:
            self._hear_end(answer, delta)
        elif delta.error is not None:
            self._finished["error"] += 1

    def _hear_end(self, answer: Answer, delta: Delta) -> None:
        result = delta.result
        assert result is not None
        histograms = self._histograms
        count = len(result.token_ids)
        now = time.monotonic()
        self._finished[result.finish_reason] += 1
        histograms["e2e_request_latency_seconds"].add(now - answer.submitted_at)
        histograms["request_prompt_tokens"].add(result.prompt_tokens)
        histograms["request_generation_tokens"].add(count)
        if answer.first_token_at:
            times = result.timings  # the engine's: nothing is heard of what is read in one pass
            prefill = times.time_to_first_token_s - times.queue_s
            decode = now - answer.first_token_at
            histograms["request_queue_time_seconds"].add(times.queue_s)
            histograms["request_prefill_time_seconds"].add(prefill)
            histograms["request_decode_time_seconds"].add(decode)
            if count > 1:
                histograms["request_time_per_output_token_seconds"].add(decode / (count - 1))
        if result.verification is not None:
            self._drafted += result.verification.drafted_tokens
            self._accepted += result.verification.accepted_tokens

    def read_bytes(self, count: int) -> None:
        """Counts keys and values that an answer has read."""
        self._bytes_read += count

    def rejected(self, reason: str) -> None:
        """Counts a request that was not let in."""
        self._rejected[reason] += 1

    def client_gone(self) -> None:
        """Counts a client that left before its answer was whole."""
        self._num_gone += 1

    def slow_clients(self, count: int) -> None:
        """Counts clients that were dropped because they did not read."""
        self._num_slow += count

    # What is shown

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The registry's question."""
        for prefix in ("tidaldecode", *filter(None, (self._service.settings.metrics_alias,))):
            for metric in self._all():
                metric.name = f"{prefix}:{metric.name}"
                metric.samples = [s._replace(name=f"{prefix}:{s.name}") for s in metric.samples]
                yield metric

    def _all(self) -> Iterator[Metric]:
        service = self._service
        names = {"model_name": service.names[0] if service.names else "", "engine": "0"}
        for name, (words, _) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(name, words, labels=list(names))
            buckets, total = self._histograms[name].shown()
            family.add_metric(list(names.values()), buckets, total)
            yield family
        yield _counted(
            _SUCCESS, "Answers that have ended.", "finished_reason", self._finished, names
        )
        yield _counted(_REJECTED, "Requests not let in.", "reason", self._rejected, names)
        counters = {
            "spec_decode_num_draft_tokens": (self._drafted, "Tokens drafted and checked."),
            "spec_decode_num_accepted_tokens": (self._accepted, "Of those, kept."),
            "kv_bytes_read": (self._bytes_read, "Keys and values read by answers that ended."),
            "clients_gone": (self._num_gone, "Clients that left before their answer's end."),
            "slow_clients_dropped": (self._num_slow, "Clients dropped because they did not read."),
        }
        yield from _simple(CounterMetricFamily, counters, names)
        if service.loaded is not None and service.state != "dead":
            yield from self._engine(service.loaded.decoder, names)

    def _engine(self, decoder: Any, names: dict[str, str]) -> Iterator[Metric]:
        stats, config = decoder.stats(), decoder.config
        pages = max(1, config.num_pages)
        gauges = {
            "num_requests_running": (
                stats["num_decoding"] + stats["num_reading"], "Requests that are worked on.",
            ),
            "num_requests_waiting": (stats["num_waiting"], "Requests that wait for a row."),
            "num_requests_paused": (
                stats["num_paused"], "Requests that have given their pages to others.",
            ),
            "num_requests_unread": (stats["num_unread"], "Requests that wait for their reader."),
            "kv_cache_usage_perc": (stats["pages_held"] / pages, "Share of pages held, 0 to 1."),
            "prefix_cache_pages": (stats["pages_cached"], "Pages that prompts may find again."),
        }  # fmt: skip
        yield from _simple(GaugeMetricFamily, gauges, names)
        read, cached = stats["read_tokens"], stats["cached_tokens"]
        counters = {
            "prompt_tokens": (read + cached, "Tokens of prompts, read or found."),
            "prompt_tokens_cached": (cached, "Of those, found in the prefix cache."),
            "generation_tokens": (stats["generated_tokens"], "Tokens generated."),
            "num_preemptions": (stats["num_pauses"], "Times that a request was paused."),
            "prefix_cache_queries": (read + cached, "Tokens looked for in the prefix cache."),
            "prefix_cache_hits": (cached, "Tokens found there."),
            "pass_tokens": (stats["pass_tokens"], "Tokens of all rows of all passes."),
            "host_gap_seconds": (stats["gap_s"], "Between two passes that followed each other."),
        }  # fmt: skip
        yield from _simple(CounterMetricFamily, counters, names)
        checks, dense = stats["num_checks"], stats["num_dense_steps"]
        passes = {
            "chunk": stats["num_chunks"] - checks, "check": checks,
            "dense": dense, "tidal": stats["num_steps"] - dense,
        }  # fmt: skip
        seconds = {
            "chunk": stats["chunk_s"] - stats["check_s"], "check": stats["check_s"],
            "dense": stats["dense_step_s"], "tidal": stats["step_s"] - stats["dense_step_s"],
        }  # fmt: skip
        yield _counted("passes", "Passes through the model.", "kind", passes, names)
        yield _counted("pass_seconds", "What they took.", "kind", seconds, names)
        waiting = GaugeMetricFamily(
            "num_requests_waiting_by_reason", "Requests that wait.", labels=[*names, "reason"]
        )
        waiting.add_metric([*names.values(), "capacity"], stats["num_waiting"])
        yield waiting
        about = {
            "block_size": config.page_size, "num_gpu_blocks": config.num_pages,
            "cache_dtype": config.kv_dtype,
        }  # fmt: skip
        info = GaugeMetricFamily("cache_config_info", "The KV cache.", labels=[*names, *about])
        info.add_metric([*names.values(), *map(str, about.values())], 1)
        yield info


def _simple(
    kind: Any, values: Mapping[str, tuple[float, str]], names: dict[str, str]
) -> Iterable[Metric]:
    for name, (value, words) in values.items():
        family = kind(name, words, labels=list(names))
        family.add_metric(list(names.values()), value)
        yield family


def _counted(
    name: str, words: str, label: str, counts: Mapping[str, float], names: dict[str, str]
) -> Metric:
    family = CounterMetricFamily(name, words, labels=[*names, label])
    for value, count in counts.items():
        family.add_metric([*names.values(), value], count)
    return family
