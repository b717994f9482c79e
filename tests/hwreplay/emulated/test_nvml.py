"""What sees nothing but NVML: the real pynvml, our lock and watchdog, the agent's meter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.hwreplay.emulated.conftest import Bench, MakeBench
from tests.profiles.device.standin import ROOT
from voltana.hwreplay.emulated.build import environment


def run(bench: Bench, code: str) -> str:
    """What a fresh process that sees the cards prints."""
    return subprocess.check_output(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment(bench.library, bench.path),
        cwd=ROOT,
        text=True,
        timeout=120,
    ).strip()


def test_pynvml_finds_the_cards_by_index_and_uuid(make_bench: MakeBench) -> None:
    bench = make_bench(num_cards=3)
    found = json.loads(
        run(
            bench,
            """
            import json, pynvml as n
            n.nvmlInit()
            cards = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
            uuids = [n.nvmlDeviceGetUUID(card) for card in cards]
            again = [n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
            mig = n.nvmlDeviceGetMigMode(cards[0])
            limit = n.nvmlDeviceGetPowerManagementLimitConstraints(cards[0])
            print(json.dumps([len(set(uuids)), again, mig, limit, n.nvmlDeviceGetName(cards[2])]))
            """,
        )
    )
    assert found == [3, [0, 1, 2], [0, 0], [100_000, 400_000], "NVIDIA A100-SXM4-80GB"]
    assert bench.card.uuid.startswith("GPU-")


def test_readings_are_the_frozen_cards(make_bench: MakeBench) -> None:
    """At second 10.25, in a pass of 250 W since 10: the last tick and window are those of 10.2."""
    bench = make_bench()
    bench.at(10.0).card.begin_pass(250.0, 5.0)
    bench.at(10.25)
    power_w, energy_j, clock_mhz = json.loads(
        run(
            bench,
            """
            import json
            from voltana.profiles.device.nvml import NvmlGpu
            gpu = NvmlGpu(0)
            print(json.dumps([gpu.power_w(), gpu.energy_j(), gpu.clock_mhz()]))
            """,
        )
    )
    assert power_w == 250.0
    assert energy_j == pytest.approx(10 * 63.0 + 0.2 * 250.0, abs=0.001)
    assert clock_mhz == 1410


@pytest.mark.parametrize(
    ("code", "error"), [(4, "PermissionDeniedError"), (3, "UnsupportedQueryError")]
)
def test_a_card_that_refuses_locks_stays_unlocked(
    make_bench: MakeBench, code: int, error: str
) -> None:
    bench = make_bench()
    bench.card.faults.lock_error = code
    out = run(
        bench,
        f"""
        from voltana.profiles.device import gpu as g
        from voltana.profiles.device.nvml import NvmlGpu
        gpu = NvmlGpu(0)
        for call in (lambda: gpu.lock_clock(1005), gpu.unlock_clock):
            try:
                call()
            except g.{error}:
                print("refused")
        """,
    )
    assert out.split() == ["refused", "refused"]
    assert bench.card.look().num_locks == 0


def test_a_lagging_card_is_waited_for(make_bench: MakeBench) -> None:
    """The session returns once the clock reads what was locked, 200 ms after the call."""
    bench = make_bench(lock_lag_s=0.2).at(-1.0)
    waited_s, after_mhz = json.loads(
        run(
            bench,
            """
            import json
            from voltana.profiles.device.nvml import NvmlGpu
            from voltana.profiles.device.lock import wait_for_clock
            gpu = NvmlGpu(0)
            gpu.lock_clock(1005)
            print(json.dumps([wait_for_clock(gpu, 1005), gpu.clock_mhz()]))
            """,
        )
    )
    assert waited_s >= 0.15
    assert after_mhz == 1005


def test_processes_that_have_ended_are_no_longer_on_the_card(make_bench: MakeBench) -> None:
    bench = make_bench()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    bench.card.add_process(child.pid)
    bench.card.add_process()
    code = (
        "from voltana.profiles.device.nvml import NvmlGpu\nprint(sorted(NvmlGpu(0).process_ids()))"
    )
    assert json.loads(run(bench, code)) == sorted([child.pid, os.getpid()])
    child.communicate(b"\n")
    assert json.loads(run(bench, code)) == [os.getpid()]


def test_the_agents_meter_counts_what_the_card_draws(make_bench: MakeBench) -> None:
    """Through NVML, within the counter's tick at either end and the meter's period."""
    bench = make_bench().at(-1.0)
    metered_j, elapsed_s = json.loads(
        run(
            bench,
            """
            import json, time
            from voltana.hwreplay.agent.energy_meter import EnergyMeter
            from voltana.hwreplay.emulated.card import Cards
            from voltana.profiles.device.nvml import NvmlGpu
            card = Cards()[0]
            card.begin_pass(300.0, 60.0)
            time.sleep(0.2)
            meter, start = EnergyMeter([NvmlGpu(0)]), time.monotonic()
            time.sleep(1.5)
            print(json.dumps([meter.energy_j, time.monotonic() - start]))
            """,
        )
    )
    assert metered_j == pytest.approx(300.0 * elapsed_s, abs=300.0 * 0.35)
