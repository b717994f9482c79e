"""The real pynvml ctypes path against a compiled libnvidia-ml.so.1."""

from __future__ import annotations

import pytest

from tests.profiles.device.standin import Standin

OPEN = "from voltana.profiles.device.nvml import NvmlGpu\ngpu = NvmlGpu(0)\n"


def test_readings_arrive_in_si_units(standin: Standin) -> None:
    out = standin.run(
        OPEN + "i = gpu.identity\n"
        "print(i.name, i.power_limit_w, i.memory_bytes, gpu.power_w(), gpu.clock_mhz())\n"
        "c = gpu.supported_clocks_mhz(); print(c[0], c[-1], len(c), gpu.temperature_c())"
    )
    first, second = out.splitlines()
    assert first == f"NVIDIA A100-SXM4-80GB 400.0 {80 * 2**30} 250.0 1410"
    assert second == "705 1410 48 40.0"


def test_energy_counter_is_in_joules(standin: Standin) -> None:
    """250 W for the seconds between the reads, up to a tick of 0.1 s at either end."""
    out = standin.run(
        OPEN + "import time\na, e = time.monotonic(), gpu.energy_j()\ntime.sleep(0.5)\n"
        "f, b = gpu.energy_j(), time.monotonic()\nprint(f - e, b - a)"
    )
    energy_j, elapsed_s = map(float, out.split())
    assert 250.0 * (0.5 - 0.1) - 0.002 <= energy_j <= 250.0 * (elapsed_s + 0.1) + 0.002


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(0, []), (0x4, ["power"]), (0x20, ["thermal"]), (0x40 | 0x80, ["power", "thermal"])],
)
def test_throttle_bits_are_named(standin: Standin, bits: int, expected: list[str]) -> None:
    standin["throttle_bits"] = bits
    assert standin.run(OPEN + "print(sorted(gpu.throttle_reasons()))") == str(expected)


@pytest.mark.parametrize(
    ("field", "value", "call", "error", "words"),
    [
        ("deny_lock", 1, "gpu.lock_clock(1005)", "PermissionDeniedError", "--frequencies current"),
        ("lost", 1, "gpu.power_w()", "GpuLostError", "finished points are kept"),
        ("energy_mode", 1, "gpu.energy_j()", "UnsupportedQueryError", "does not offer"),
    ],
)
def test_codes_become_typed_errors_with_a_remedy(
    standin: Standin, field: str, value: int, call: str, error: str, words: str
) -> None:
    out = standin.run(
        OPEN + "from voltana.profiles.device import gpu as g\n"
        "from tests.profiles.device.standin import put\n"
        f"put({field}={value})\n"
        f"try:\n    {call}\nexcept g.{error} as e:\n    print(e)"
    )
    assert words in out
    assert "\n" not in out


def test_missing_driver_and_wrong_index_say_so(standin: Standin) -> None:
    catch = (
        "from voltana.profiles.device.nvml import NvmlGpu\n"
        "from voltana.profiles.device.gpu import *\n"
        "from voltana.profiles.device.gpu import DriverMissingError\n"
        "try:\n    NvmlGpu({index})\nexcept DriverMissingError as e:\n    print(e)"
    )
    assert "0..0, got 7" in standin.run(catch.format(index=7))
    standin.env["LD_LIBRARY_PATH"] = ""
    assert "--power-w" in standin.run(catch.format(index=0))
