"""A policy in a module of the user's own: the shipped example, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.policies.doubles import decode_state, make_context
from voltana.experiments.runs import run
from voltana.experiments.sweep.identity import run_key
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.metrics import clock_residency
from voltana.sim.policies.base import RequestView
from voltana.sim.policies.registry import make_controller, make_router
from voltana.sim.records import COMPLETED

# clocks 1000, 1200, 1400; low 32, high 192: wanted = 1000 + 400·(load - 32)/160, rounded up
RAMP = [(0, 1000), (32, 1000), (33, 1200), (112, 1200), (113, 1400), (500, 1400)]


@pytest.mark.parametrize(("load", "clock"), RAMP)
def test_the_ramp_by_hand(load: int, clock: int) -> None:
    controller = make_controller("voltana.experiments.examples.own_policy", make_context())
    state = decode_state(waiting=load % 7)
    state.num_running = load - load % 7
    assert controller.decide(state) == clock


def test_it_runs_in_the_simulator_by_its_module() -> None:
    record = run(
        SimConfig(
            rate_rps=30,
            duration_s=10,
            controller="voltana.experiments.examples.own_policy:low=1,high=2",
        )
    )
    # from two requests on it asks for the top clock, below for the lowest listed one
    shares = clock_residency(record)["decode"]
    assert set(shares) <= {"0", "1005", "1410"}
    assert shares["1410"] > 0.9


def test_the_router_by_hand() -> None:
    """Queued prompt tokens in prefill; in decode KV tokens times the weight, plus the queue."""
    view = RequestView(0, 0.0, 100, None)
    prefill = [decode_state(index=i) for i in range(2)]
    prefill[0].waiting_tokens, prefill[1].waiting_tokens = 900, 100
    prefill[0].open_requests, prefill[1].open_requests = 1, 5
    decode = [decode_state(index=i, kv=kv) for i, kv in ((4, 1000), (5, 200))]
    decode[1].waiting_tokens = 600  # 1000 to 800, at half weight 500 to 700
    for weight, expected in (("1", (1, 1)), ("0.5", (1, 0))):
        router = make_router(
            f"voltana.experiments.examples.own_router:weight={weight}", make_context()
        )
        assert router.route(view, prefill, decode) == expected
    decode[1].waiting_tokens = 800
    decode[0].open_requests = 1
    router = make_router("voltana.experiments.examples.own_router", make_context())
    assert router.route(view, prefill, decode) == (1, 1)  # as much work: the fewer requests


def test_the_router_runs_in_the_simulator_by_its_module() -> None:
    record = run(
        SimConfig(rate_rps=30, duration_s=10, router="voltana.experiments.examples.own_router")
    )
    for ids in (record.requests.prefill_id, record.requests.decode_id):
        assert set(ids.tolist()) == {0, 1}
    assert (record.requests.status == COMPLETED).all()


def test_a_module_needs_no_dot_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says: `--controller my_module:key=value`."""
    source = tmp_path / "my_ramp.py"
    source.write_text("from voltana.experiments.examples.own_policy import CONTROLLER\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    controller = make_controller("my_ramp:high=120", make_context())
    assert controller.decide(decode_state(waiting=0)) == 1000
    before = run_key(SimConfig(controller="my_ramp"))
    source.write_text("from voltana.experiments.examples.own_policy import CONTROLLER  # changed\n")
    assert run_key(SimConfig(controller="my_ramp")) != before


def test_mistakes_are_one_line() -> None:
    for spec, words in (
        ("no.such.module", "cannot import controller 'no.such.module': no module 'no'"),
        ("voltana.experiments.draw.plots", "holds no controller: it needs CONTROLLER = Entry"),
        ("voltana.experiments.examples.own_policy:hi=3", "did you mean 'high'"),
        ("ecofrek", "unknown controller 'ecofrek': did you mean 'ecofreq'?"),
        ("eco-freq", "unknown controller 'eco-freq': did you mean 'ecofreq'?"),
        # a router's name, and a module of the standard library
        ("random", "unknown controller 'random'"),
        # what can be imported and is no policy
        ("numpy", "module 'numpy' holds no controller: it needs CONTROLLER = Entry"),
    ):
        with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
            make_controller(spec, make_context())
        assert words in str(caught.value)
