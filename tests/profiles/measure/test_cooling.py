"""A throttled trial is run again once the card has cooled, through the real binding."""

from __future__ import annotations

import json

from tests.profiles.device.standin import Standin

THERMAL_BIT = 0x20
POWER_BIT = 0x4
SETUP = """
import json, threading, time
from contextlib import contextmanager
from voltana.profiles.device.nvml import NvmlGpu
from voltana.profiles.engines.base import Point, Window
from voltana.profiles.measure.trial import Protocol, measure_point
from tests.profiles.device.standin import put

class Busy:
    num_runs = 0

    @contextmanager
    def open(self, point):
        yield self

    def run(self, *, min_duration_s, min_iterations):
        Busy.num_runs += 1
        start_ns = time.monotonic_ns()
        time.sleep(0.1)
        end_ns = time.monotonic_ns()
        return Window(iteration_s=(0.1,), elapsed_s=0.1, tokens=8.0, spans_ns=((start_ns, end_ns),))

def measure(num_trials=1, left_s=600.0, **protocol):
    rules = Protocol(
        window_s=0.1, warm_up_s=0.0, min_iterations=1, num_trials=num_trials, **protocol
    )
    with NvmlGpu(0) as gpu:
        point = Point(phase="decode", batch_size=1, tokens=8)
        deadline_s = time.monotonic() + left_s
        trial, *_ = measure_point(Busy(), [gpu], point, rules, deadline_s=deadline_s)
    print(json.dumps([trial.flags, trial.temperature_c, Busy.num_runs]))
"""


def test_a_repeat_that_cannot_be_metered_leaves_the_first(standin: Standin) -> None:
    """The sampler stalls in the second run: the throttled window stays, flagged."""
    standin["temperature_c"], standin["throttle_bits"] = 88, THERMAL_BIT
    out = standin.run(
        SETUP + "import voltana.profiles.measure.trial as trial\n"
        "from voltana.profiles.measure.power import SampleGapError\n"
        "real = trial.run_trial\n"
        "def stalls(*given):\n"
        "    if Busy.num_runs > 1:\n        raise SampleGapError('stalled')\n"
        "    return real(*given)\n"
        "trial.run_trial = stalls\n"
        "measure(cool_by_c=10.0, cooling_limit_s=0.1, num_retries=1)"
    )
    flags, _, num_runs = json.loads(out)
    assert "throttle-thermal" in flags
    assert num_runs == 2  # the warm-up and the window


def test_a_hot_card_is_waited_for_and_measured_again(standin: Standin) -> None:
    """Hot at 88 C; it cools to 70 C a second later, and only then is the trial repeated."""
    standin["temperature_c"], standin["throttle_bits"] = 88, THERMAL_BIT
    out = standin.run(
        SETUP + "timer = threading.Timer(1.0, lambda: put(temperature_c=70, throttle_bits=0))\n"
        "timer.start()\nmeasure(cool_by_c=10.0, cooling_limit_s=600.0, num_retries=1)"
    )
    flags, temperature_c, num_runs = json.loads(out)
    assert not any(flag.startswith("throttle") for flag in flags)
    assert temperature_c == 70.0
    assert num_runs == 3  # warm-up, the throttled one, the one that counts


def test_a_card_that_stays_hot_ends_the_wait_and_the_trial_keeps_its_flag(standin: Standin) -> None:
    standin["temperature_c"], standin["throttle_bits"] = 88, THERMAL_BIT
    out = standin.run(SETUP + "measure(cool_by_c=10.0, cooling_limit_s=0.05, num_retries=2)")
    flags, temperature_c, num_runs = json.loads(out)
    assert "throttle-thermal" in flags
    assert temperature_c == 88.0
    assert num_runs == 1 + 1 + 2


def test_at_the_power_limit_one_retry_of_one_trial_is_all(standin: Standin) -> None:
    """88 C and 600 s of cooling allowed: a capped card would never cool down to what is asked."""
    standin["temperature_c"], standin["throttle_bits"] = 88, POWER_BIT
    out = standin.run(
        SETUP + "measure(num_trials=3, cool_by_c=50.0, cooling_limit_s=600.0, power_rest_s=0.01)"
    )
    flags, _, num_runs = json.loads(out)
    assert "throttle-power" in flags
    assert num_runs == 1 + 3 + 1  # warm-up, the trials, the one retry


def test_a_hopelessly_hot_point_is_not_cooled_for_in_every_trial(standin: Standin) -> None:
    standin["temperature_c"], standin["throttle_bits"] = 88, THERMAL_BIT
    out = standin.run(SETUP + "measure(num_trials=3, cooling_limit_s=0.05, num_retries=2)")
    assert json.loads(out)[2] == 1 + 3 + 2


def test_nothing_is_retried_after_the_deadline(standin: Standin) -> None:
    """One cooling may begin before it; it ends with it, though 600 s are allowed."""
    standin["temperature_c"], standin["throttle_bits"] = 88, THERMAL_BIT
    out = standin.run(
        SETUP + "measure(num_trials=3, left_s=2.0, cooling_limit_s=600.0, num_retries=2)"
    )
    assert json.loads(out)[2] == 1 + 3 + 1
    over = standin.run(SETUP + "measure(left_s=0.0, cooling_limit_s=600.0, num_retries=2)")
    assert json.loads(over)[2] == 1 + 1
