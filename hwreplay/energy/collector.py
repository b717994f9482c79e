"""The divided energy as Prometheus shows it: requests, rest and others add up to the meter."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from voltana.hwreplay.energy.bills import Bills


class EnergyCollector(Collector):
    """Asked at each scrape."""

    def __init__(self, bills: Bills) -> None:
        self._bills = bills

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "voltana_attributed_joules",
            "Energy of the instance's cards by who used it: requests, idle or others",
            labels=("phase", "instance", "to"),
        )
        for (phase, instance_id), shares in self._bills.instances.items():
            used = {"requests": shares.requests_j, "idle": shares.idle_j, "others": shares.others_j}
            for to, energy_j in used.items():
                family.add_metric((phase, str(instance_id), to), energy_j)
        yield family
