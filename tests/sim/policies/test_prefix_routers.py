"""Routers that know what prompts share: decisions worked out by hand, and what they do in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import run
from tests.sim.policies.doubles import CLOCKS, Formula, decode_state, make_context
from voltana.sim.policies.base import InstanceState, Phase, Router
from voltana.sim.policies.registry import make_router
from voltana.sim.policies.requests import Prompt, RequestView
from voltana.sim.workload.generate import make_workload


def asked(*segments: tuple[int, int]) -> RequestView:
    """A request whose prompt has these segments: name, tokens."""
    prompt = Prompt([name for name, _ in segments], [tokens for _, tokens in segments])
    return RequestView(0, 0.0, prompt.ends[-1], None, prompt)


def prefill_state(number: int, *, opened: int = 0, cached: int = 0, **values: Any) -> InstanceState:  # noqa: ANN401
    return InstanceState(
        instance_id=number, phase="prefill", open_requests=opened,
        count_cached=lambda prompt: cached, **values,
    )  # fmt: skip


def pick(router: Router, request: RequestView, *prefill: InstanceState) -> int:
    decode = [decode_state(opened=3), decode_state(opened=1)]
    chosen, at = router.route(request, list(prefill), decode)
    assert at == 1  # fewest open requests
    return chosen


def test_affinity_goes_to_the_longest_prefix_that_is_not_much_fuller() -> None:
    router = make_router("prefix-affinity:slack=4", make_context())
    request = asked((1, 100))
    idle, some = prefill_state(0), prefill_state(1, opened=4, cached=60)
    assert pick(router, request, idle, some) == 1
    assert pick(router, request, idle, prefill_state(1, opened=5, cached=60)) == 0
    more = prefill_state(2, opened=3, cached=90)
    assert pick(router, request, idle, some, more) == 2
    assert pick(router, request, some, prefill_state(1, opened=3, cached=60)) == 1  # as much


def test_the_gateway_s_rule_remembers_what_it_sent() -> None:
    """A prompt of 100 + 100 goes to the emptiest, 0; a second that shares the half is not above
    the threshold; one that shares 101 of 200 is, and follows, though 0 is fuller by 32."""
    router = make_router("cache-aware", make_context())
    first, half, more = (
        asked((1, 101), (2, 99)),
        asked((3, 100), (4, 100)),
        asked((1, 101), (5, 99)),
    )
    assert pick(router, first, prefill_state(0), prefill_state(1)) == 0
    assert pick(router, half, prefill_state(0, opened=1), prefill_state(1)) == 1
    # half of it is with 1, not more than half
    assert (
        pick(router, asked((3, 100), (6, 100)), prefill_state(0), prefill_state(1, opened=1)) == 0
    )
    assert pick(router, more, prefill_state(0, opened=32), prefill_state(1)) == 0
    # 33 more and above 1.1 times the fewest: uneven
    assert pick(router, more, prefill_state(0, opened=33), prefill_state(1)) == 1
    # uneven takes both: 400 is not above 1.1 times 365
    assert pick(router, first, prefill_state(0, opened=400), prefill_state(1, opened=365)) == 0


def test_the_gateway_s_memory_has_an_end() -> None:
    router = make_router("cache-aware:tree=250", make_context())
    first = asked((1, 200))
    assert pick(router, first, prefill_state(0), prefill_state(1)) == 0
    assert pick(router, asked((2, 200)), prefill_state(0), prefill_state(1, opened=1)) == 0
    assert pick(router, first, prefill_state(0, opened=1), prefill_state(1)) == 1  # forgotten


class Squares:
    """Watts that grow with the clock, 50 at rest: 100, 144 and 196 above it."""

    def power_w(self, phase: Phase, clock_mhz: int, batch_size: int, tokens: int) -> float:
        return 50.0 + (clock_mhz / 100) ** 2

    def idle_power_w(self, clock_mhz: int) -> float:
        return 50.0


def energy_router() -> Router:
    """1 ms a token at 1000 MHz, in proportion to 1/f: J(T) = T · 1 s/f · f²/10⁴ W, 0.1 J a token at
    1000 MHz, 0.12 at 1200, 0.14 at 1400. Budget: 500 - 2·50 ms, less 10 %: 360 ms."""
    context = make_context(Formula(lambda p, f, b, t: 1e-3 * t * 1000 / f), levels_mhz=CLOCKS)
    object.__setattr__(context, "power", Squares())
    return make_router("prefix-energy", context)


def test_recomputation_is_weighed_against_a_higher_clock() -> None:
    """A prompt of 300 tokens. A has 150 of it and 250 queued: 400 tokens in 360 ms need 1200 MHz,
    400·0.12 - 250·0.10 = 23 J. B has nothing: 300·0.10 = 30 J. With 300 queued A needs 1400
    (450 tokens: 375 ms at 1200): 450·0.14 - 300·0.10 = 33 J, and B has it."""
    router, request = energy_router(), asked((1, 300))
    empty = prefill_state(0)
    a = prefill_state(1, cached=150, waiting_tokens=250, num_waiting=1)
    assert pick(router, request, empty, a) == 1
    fuller = prefill_state(1, cached=150, waiting_tokens=300, num_waiting=1)
    assert pick(router, request, empty, fuller) == 0
    running = prefill_state(1, cached=150, kv_tokens=300, num_running=1, is_busy=True)
    assert pick(router, request, empty, running) == 0


def test_one_that_is_late_at_any_clock_comes_last_and_the_soonest_of_them_first() -> None:
    """504 tokens take 360 ms at the top clock. 600 queued and all cached but one: late; nothing
    cached and 200 queued: 500 tokens, in time. Of two that are late the shorter queue."""
    router, request = energy_router(), asked((1, 300))
    late = prefill_state(0, cached=299, waiting_tokens=600, num_waiting=2)
    assert pick(router, request, late, prefill_state(1, waiting_tokens=200, num_waiting=1)) == 1
    later = prefill_state(1, waiting_tokens=600, num_waiting=2)
    assert pick(router, request, later, late) == 1


@pytest.mark.parametrize("router", ["prefix-affinity", "cache-aware", "prefix-energy"])
def test_without_knowing_prompts_the_emptiest_takes_it(router: str) -> None:
    blind = RequestView(0, 0.0, 50, None)
    states = prefill_state(0, opened=3, waiting_tokens=60), prefill_state(1, opened=2)
    assert pick(make_router(router, make_context()), blind, *states) == 1


def test_routers_that_see_hits_have_more_of_them(tmp_path: Path) -> None:
    """Four prefill instances, conversations of about eight turns: by round-robin a turn comes to
    where its history is by one chance in four."""
    profile = write_synthetic_profile(tmp_path, kv_capacity_tokens=200_000)
    workload = make_workload("chat:turns=8,think=5", rate_rps=8.0, duration_s=60.0, seed=1)
    shares = {}
    for router in ("round-robin", "prefix-affinity", "cache-aware", "prefix-energy"):
        _, summary = run(
            profile, workload, router=router, num_prefill=4, prefix_cache_tokens=60_000,
            extrapolate=True, slo_ttft_s=2.0,
        )  # fmt: skip
        shares[router] = summary["cached_share"]
    blind = shares.pop("round-robin")
    assert min(shares.values()) > blind + 0.1, shares
