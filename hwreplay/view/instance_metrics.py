"""What agents report of their instances, as Prometheus metrics and events of the log.

The router shows them beside its own, an agent that stands alone shows them by itself.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from voltana.hwreplay.messages.agent_reports import AgentReport
from voltana.hwreplay.messages.log_lines import say

LOG: Final = logging.getLogger("voltana.instances")
LABELS: Final = ("phase", "instance")
METHOD: Final = "same_batches"
"""How the saving is estimated: `voltana.hwreplay.agent.account.saved_j`."""
SHADOW: Final = "shadow"
ACT: Final = "act"
WINDOW_S: Final = 60.0
SLICE_S: Final = 1.0
RISING: Final = {
    "energy_j": ("voltana_energy_joules", "Energy of the instance's cards"),
    "decisions": ("voltana_decisions", "Decisions of the instance's controller"),
    "iterations": ("voltana_iterations", "Iterations that the engine has reported"),
    "observed_s": ("voltana_iteration_seconds", "Their durations"),
    "predicted_s": ("voltana_iteration_predicted_seconds", "What the predictor said of them"),
    "output_tokens": ("voltana_output_tokens", "Tokens made in decode iterations"),
}
"""Fields of a report that only rise, with name (Prometheus adds _total) and help of a counter."""


class InstanceMetrics:
    """Metrics of instances, fed by reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: Sequence[str] = LABELS) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self._counters = {
            field: Counter(name, text, LABELS, registry=registry)
            for field, (name, text) in RISING.items()
        }
        self.clock_mhz = gauge("voltana_clock_mhz", "Clock lock in force, 0 is unlocked")
        self._wish_mhz = gauge("voltana_wished_clock_mhz", "Clock that the controller wants")
        self._safe = gauge("voltana_safe_state", "1 while the clock is unlocked for safety")
        self._released = gauge(
            "voltana_guard_released", "1 while the guard keeps the clock unlocked"
        )
        self._attainment = gauge(
            "voltana_instance_attainment_ratio",
            "Kept token gaps (decode) or prompts (prefill) of the last minute's",
        )
        self._headroom = gauge(
            "voltana_headroom_ratio",
            "What the promise would leave of the present batch's iteration at the top clock",
        )
        self._saved_j = gauge(
            "voltana_estimated_saved_joules",
            "Saved against the top clock since the agent's start, by the method named",
            (*LABELS, "method", "mode"),
        )
        self._j_per_token = gauge(
            "voltana_joules_per_output_token", "Of all instances over the last minute", ()
        )
        self._last: dict[tuple[str, str], AgentReport] = {}
        self._gained: dict[tuple[str, ...], float] = {}
        """What counters have gained since they were shown, by field, phase and instance."""
        self._energy_j = self._tokens = 0.0
        self._history: deque[tuple[float, float, float]] = deque()
        """Time in s, joules and tokens so far."""

    @property
    def last(self) -> Sequence[AgentReport]:
        """The latest report of each instance."""
        return list(self._last.values())

    def take(self, report: AgentReport) -> None:
        """Count what a report brings, and log what has changed."""
        key = (report.phase, str(report.instance_id))
        last = self._last.get(key)
        self._last[key] = report
        for field in RISING:
            if (value := getattr(report, field)) is None:
                continue  # no meter: no energy, which is not an energy of 0
            gained = _gained(value, getattr(last, field, None))
            self._gained[field, *key] = self._gained.get((field, *key), 0.0) + gained
            self._energy_j += gained * (field == "energy_j")
            self._tokens += gained * (field == "output_tokens")
        self._log_changes(report, last)
        self._count_joules_per_token(report.at_s)

    def show(self) -> None:
        """Bring the metrics up to the latest reports; far more of those come than are shown."""
        for (field, *labels), gained in self._gained.items():
            self._counters[field].labels(*labels).inc(gained)
        self._gained.clear()
        for key, report in self._last.items():
            self._show(key, report)

    def _show(self, key: tuple[str, str], report: AgentReport) -> None:
        self.clock_mhz.labels(*key).set(report.clock_mhz)
        self._wish_mhz.labels(*key).set(report.wish_mhz)
        self._safe.labels(*key).set(bool(report.safe))
        self._released.labels(*key).set(report.is_released)
        self._headroom.labels(*key).set(report.headroom)
        if report.attainment is not None:
            self._attainment.labels(*key).set(report.attainment)
        mode = ACT if report.acts else SHADOW
        self._saved_j.labels(*key, METHOD, mode).set(report.saved_j)

    def _log_changes(self, report: AgentReport, last: AgentReport | None) -> None:
        name = f"{report.phase}-{report.instance_id}"
        was_safe, was_released = ("", False) if last is None else (last.safe, last.is_released)
        if report.safe and not was_safe:
            say(LOG, logging.WARNING, "safe state", instance=name, reason=report.safe)
        elif was_safe and not report.safe:
            say(LOG, logging.INFO, "safe state over", instance=name)
        if report.is_released != was_released:
            event = "guard releases the clock" if report.is_released else "guard is satisfied"
            say(LOG, logging.WARNING, event, instance=name, attainment=report.attainment)

    def _count_joules_per_token(self, at_s: float) -> None:
        if self._history and at_s - self._history[-1][0] < SLICE_S:
            return
        self._history.append((at_s, self._energy_j, self._tokens))
        while at_s - self._history[0][0] > WINDOW_S:
            self._history.popleft()
        _, first_j, first_tokens = self._history[0]
        made = self._tokens - first_tokens
        is_known = made and self._energy_j
        self._j_per_token.set((self._energy_j - first_j) / made if is_known else math.nan)


def _gained(value: float, last: float | None) -> float:
    """What a counter has gained; one that falls belongs to a new agent and began at 0."""
    return value if last is None or value < last else value - last
