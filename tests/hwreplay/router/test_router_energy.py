"""Joules that the router says its requests took, beside the meters of its agents."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.router.test_router import bench, request_body
from tests.hwreplay.stub_worker import StubTimes
from voltana.hwreplay.messages.agent_reports import AgentReport, ReportSender
from voltana.sim.policies.base import Phase

WATTS: dict[tuple[Phase, int], float] = {
    ("prefill", 0): 150.0, ("decode", 0): 200.0, ("decode", 1): 300.0,
}  # fmt: skip


def test_the_requests_energy_the_rest_and_the_meters_agree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three meters of constant power; the access log, the header and /metrics must add up."""
    caplog.set_level(logging.INFO, "voltana.router")
    address, template = f"ipc://{tmp_path}/reports", f"ipc://{tmp_path}/{{phase}}-{{index}}"
    times = StubTimes(prefill_base_s=0.01, decode_base_s=0.01)
    options: dict[str, Any] = {"access_log": True, "energy_header": True, "reports": address}

    async def play() -> tuple[dict[tuple[str, str], float], list[float], float]:
        async with bench(1, 2, times=times, metrics=template, **options) as b:
            sender = ReportSender(address)

            async def read_meters() -> None:
                while True:
                    await asyncio.sleep(0.05)
                    now_s = b.service.clock.now_s()
                    for (phase, index), watts in WATTS.items():
                        sender.send(
                            AgentReport(phase, index, now_s, 0, watts * now_s, 0, energy_at_s=now_s)
                        )

            meters = asyncio.create_task(read_meters())
            await asyncio.sleep(0.2)
            whole = request_body(8, 20) | {"stream": False}

            async def ask() -> float:
                async with b.client.post(b.url + "/generate", json=whole) as answer:
                    return float(answer.headers["X-Voltana-Energy-J"])

            streams = [b.generate(8, 30 + i) for i in range(6)]
            found = await asyncio.gather(*(ask() for _ in range(4)), *streams)
            bills = b.service.fleet.bills
            assert bills is not None
            while bills.num_waiting:
                await asyncio.sleep(0.05)
            meters.cancel()
            sender.close()
            await asyncio.sleep(0.3)  # reports under way: nothing is divided after the last one
            # what the meters had counted up to where the energy has been divided
            counted_j = sum(WATTS[key] * x.settled_s for key, x in bills.instances.items())
            return await b.samples(), [x for x in found if isinstance(x, float)], counted_j

    samples, headers, counted_j = asyncio.run(play())
    logged = [r.fields for r in caplog.records if r.message == "request"]  # type: ignore[attr-defined]
    joules = [line["energy_j"] for line in logged]
    assert len(joules) == 10
    assert sorted(headers) == sorted(x["energy_j"] for x in logged if not x["pieces"])
    used = {
        to: sum(
            v for (name, key), v in samples.items() if name.startswith("voltana_attr") and to in key
        )
        for to in ("requests", "idle", "others")
    }
    assert sum(joules) == pytest.approx(used["requests"], abs=0.001 * len(joules))  # as rounded
    assert sum(used.values()) == pytest.approx(counted_j, rel=1e-9)
    # a record that comes later than its request's end was told finds nobody: on a busy machine
    assert 0 <= used["others"] < 0.1 * used["requests"]
    assert min(joules) > 0
