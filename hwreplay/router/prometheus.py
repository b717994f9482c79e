"""What the router shows at /metrics."""

from __future__ import annotations

import math
import time
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from voltana.hwreplay.energy.bills import Bills
from voltana.hwreplay.energy.collector import EnergyCollector
from voltana.hwreplay.view.attainment import Attainment
from voltana.hwreplay.view.instance_metrics import InstanceMetrics

COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
REJECTED: Final = "rejected"
TTFT: Final = "ttft"
ITL: Final = "itl"
OUTCOMES: Final = (COMPLETED, FAILED, CANCELLED, REJECTED)

_TTFT_S: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0, 5.0, 10.0, 30.0)
_ITL_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.12, 0.25, 1.0)
_ADDED_S: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_INSTANCE: Final = ("phase", "instance")


class RouterMetrics:
    """The router's own registry: nothing global, so that several can live in one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "voltana_requests", "Requests by how they ended", ["outcome"], registry=registry
        )
        self.ended = {outcome: self.requests.labels(outcome) for outcome in OUTCOMES}
        """`requests` by outcome."""
        self.failures = Counter(
            "voltana_failures", "Failed requests by reason", ["reason"], registry=registry
        )
        self.retries = Counter(
            "voltana_retries", "Attempts on another pair, nothing having started", registry=registry
        )
        self.routing_errors = Counter(
            "voltana_routing_errors", "Requests routed round-robin as the policy has failed",
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("voltana_in_flight", "Requests being served", registry=registry)
        self.queued = Gauge("voltana_queued", "Requests waiting for a place", registry=registry)
        self.ttft_s = Histogram(
            "voltana_ttft_seconds", "Request to first token", buckets=_TTFT_S, registry=registry
        )
        self.itl_s = Histogram(
            "voltana_itl_seconds", "Between two pieces of a stream", buckets=_ITL_S,
            registry=registry,
        )  # fmt: skip
        self.routing_s = Histogram(
            "voltana_routing_seconds", "Request's arrival to both servers' having been sent it",
            buckets=_ADDED_S, registry=registry,
        )  # fmt: skip
        self.healthy = Gauge(
            "voltana_healthy", "1 while the instance answers", _INSTANCE, registry=registry
        )
        self.suspect = Gauge(
            "voltana_suspect", "1 while the instance should compute and is silent", _INSTANCE,
            registry=registry,
        )  # fmt: skip
        self.open = Gauge(
            "voltana_open_requests", "Requests assigned and not ended", _INSTANCE, registry=registry
        )
        self.kv_tokens = Gauge(
            "voltana_kv_tokens", "KV-cache tokens in use", _INSTANCE, registry=registry
        )
        self.instances = InstanceMetrics(registry)
        self._promise_s = Gauge(
            "voltana_promise_seconds", "The promise: ttft, itl", ["promise"], registry=registry
        )
        self._attainment = Gauge(
            "voltana_attainment_ratio",
            "Kept of the last minute: requests (ttft; those that failed miss), token gaps (itl)",
            ["promise"], registry=registry,
        )  # fmt: skip
        self._promises = {TTFT: math.inf, ITL: math.inf}
        self._kept = {TTFT: Attainment(), ITL: Attainment()}

    def promise(self, ttft_s: float, itl_s: float) -> None:
        """What is promised from now on."""
        self._promises = {TTFT: ttft_s, ITL: itl_s}
        for name, seconds in self._promises.items():
            self._promise_s.labels(name).set(seconds)

    def show_energy(self, bills: Bills) -> None:
        """Show whose the energy was, too."""
        self._registry.register(EnergyCollector(bills))

    def on_first_token(self, ttft_s: float) -> None:
        """A stream has begun, so long after its request's arrival."""
        self.ttft_s.observe(ttft_s)
        self._count(TTFT, ttft_s)

    def on_gap(self, gap_s: float) -> None:
        """A stream goes on after so long."""
        self.itl_s.observe(gap_s)
        self._count(ITL, gap_s)

    def on_failure(self) -> None:
        """A request has failed: whoever waited for its first token has none in time."""
        self._count(TTFT, math.inf)

    def _count(self, name: str, seconds: float) -> None:
        is_kept = seconds <= self._promises[name]
        self._kept[name].add(time.monotonic(), kept=int(is_kept), total=1)

    def text(self) -> bytes:
        """The exposition format."""
        self.instances.show()
        for name, kept in self._kept.items():
            share = kept.share(time.monotonic())
            self._attainment.labels(name).set(math.nan if share is None else share)
        return generate_latest(self._registry)
