"""The environment against the simulator that it plays, and against gymnasium's own checker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.engine.fixtures import make_requests
from tests.sim.engine.test_coalescing import same_instances, same_requests
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config
from voltana.sim.engine.simulate import simulate
from voltana.sim.mdp.learn.arrivals import ArrivalSimulation, count_above
from voltana.sim.metrics import summarise, ttft_s
from voltana.sim.records import RunRecord
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.workload import Workload

gymnasium = pytest.importorskip("gymnasium")
env_checker = pytest.importorskip("gymnasium.utils.env_checker")
RoutingEnv = pytest.importorskip("voltana.sim.mdp.learn.env").RoutingEnv

TIGHT = {"slo_ttft_s": 0.1, "slo_itl_s": 0.012, "router": "least-requests", "num_decode": 3}
"""Promises that many tokens break, so that penalties are there to be counted."""


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("a100-80g-sxm/llama-3.1-8b")


def workload(seed: int) -> Workload:
    return make_workload("sharegpt", rate_rps=30.0, duration_s=10.0, seed=seed)


def fewest(simulation: ArrivalSimulation) -> int:
    opened = [s.open_requests for s in simulation.decode]
    return opened.index(min(opened))


def play(
    simulation: ArrivalSimulation, choose: Callable[[ArrivalSimulation], int]
) -> tuple[RunRecord, dict[str, float]]:
    total = {"energy_j": 0.0, "decode_energy_j": 0.0, "late_tokens": 0.0, "elapsed_s": 0.0}
    while not simulation.is_over:
        cost = simulation.accept(choose(simulation))
        for name in total:
            total[name] += getattr(cost, name)
    assert simulation.record is not None
    return simulation.record, total


@pytest.mark.parametrize("controller", ["ecofreq", "static:f=1005"])
@pytest.mark.parametrize("limit", [None, 6.0])
def test_the_same_decisions_make_the_same_run(
    profile: Profile, controller: str, limit: float | None
) -> None:
    """Deciding from outside by the rule of a router gives that router's run; sums of
    times are rounded otherwise, since looking at an instance books what it has done so far."""
    config = make_config(TIGHT | {"controller": controller})
    requests = workload(7)
    if limit is not None:
        requests = requests.sliced(0.0, limit)
    expected = simulate(config, profile, requests)
    record, total = play(ArrivalSimulation(config, profile, requests), fewest)
    same_requests(expected, record)
    same_instances(expected, record)
    energy_j = summarise(expected)["energy_j"]
    assert total["energy_j"] == pytest.approx(energy_j, rel=1e-12)
    assert total["elapsed_s"] == pytest.approx(
        expected.makespan_s - requests.arrival_s[0], rel=1e-12
    )


def late_tokens(record: RunRecord) -> tuple[int, int]:
    """Gaps and first tokens, counted from the finished record one by one."""
    gaps = int(record.itl_weight[record.itl_s > record.slo_itl_s].sum())
    return gaps, int((ttft_s(record) > record.slo_ttft_s).sum())


@pytest.mark.parametrize("counts_prefill", [True, False])
def test_rewards_add_up_to_the_cost_of_the_run(profile: Profile, counts_prefill: bool) -> None:
    config = make_config(TIGHT)
    env = RoutingEnv(config, profile, workload, penalty_j=3.0, counts_prefill=counts_prefill)
    env.reset(seed=5)
    total, ended, steps = 0.0, False, 0
    while not ended:
        _, reward, ended, truncated, _ = env.step(steps % 3)
        assert not truncated
        total += reward
        steps += 1
    record = env.simulation.record
    assert steps == len(record.requests) == 300
    counted = [i for i in record.instances if counts_prefill or i.phase == "decode"]
    energy_j = sum(i.busy_energy_j + i.idle_energy_j for i in counted)
    gaps, first_tokens = late_tokens(record)
    assert gaps > 1000
    assert first_tokens > 10
    late = gaps + first_tokens if counts_prefill else gaps
    assert total == pytest.approx(-(energy_j + 3.0 * late), rel=1e-9)


@pytest.mark.parametrize("levels", [(), (1005, 1410)])
@pytest.mark.filterwarnings("ignore:.*render:UserWarning")
def test_gymnasium_finds_nothing_wrong(profile: Profile, levels: tuple[int, ...]) -> None:
    env = RoutingEnv(SimConfig(), profile, workload, levels_mhz=levels)
    env_checker.check_env(env, skip_render_check=True)
    assert env.action_space.n == 2 * max(1, len(levels))


def test_a_seed_is_a_run(profile: Profile) -> None:
    env = RoutingEnv(SimConfig(), profile, workload)

    def episode(seed: int | None) -> list[float]:
        first, _ = env.reset(seed=seed)
        return [*first.tolist(), *(env.step(0)[1] for _ in range(20))]

    assert episode(1) == episode(1)
    assert episode(None) != episode(1)


def test_without_draining_the_episode_is_cut_at_the_last_arrival(profile: Profile) -> None:
    env = RoutingEnv(SimConfig(), profile, workload, drains=False)
    env.reset(seed=1)
    ends: list[tuple[bool, bool]] = []
    elapsed_s = 0.0
    while not any(ends[-1:] and ends[-1]):
        _, _, terminated, truncated, info = env.step(1)
        ends.append((terminated, truncated))
        elapsed_s += info["elapsed_s"]
    assert ends == [(False, False)] * 299 + [(False, True)]
    with pytest.raises(VoltanaError, match="the run has ended"):
        env.step(0)
    arrival_s = workload(env.reset(seed=1)[1]["workload_seed"]).arrival_s
    assert elapsed_s == pytest.approx(arrival_s[-1] - arrival_s[0], rel=1e-12)


def test_a_clock_holds_until_it_is_set_again(profile: Profile) -> None:
    """One request at a time: it runs at the level that came with it, but for its first iteration,
    after which the controller is asked."""
    config = make_config(
        {"num_prefill": 1, "num_decode": 1, "actuation_latency_s": 0.0, "first_token": "prefill"}
    )
    requests = make_requests((0.0, 100, 200), (10.0, 100, 200), (20.0, 100, 200))
    levels = (705, 1005, 1410)
    run = ArrivalSimulation(config, profile, requests, levels_mhz=levels)
    for clock_mhz in levels:
        run.accept(0, clock_mhz)
    assert run.record is not None
    decode = run.record.instances[1]
    assert set(decode.clock_busy_s) == set(levels)
    slowest_first = [decode.clock_busy_s[clock] for clock in levels]
    assert slowest_first == sorted(slowest_first, reverse=True)
    again = ArrivalSimulation(config, profile, requests, levels_mhz=levels)
    again.accept(0, 705)
    again.accept(0)
    again.accept(0)
    assert again.record is not None
    assert set(again.record.instances[1].clock_busy_s) == {705, 1410}
    assert again.record.instances[1].num_clock_changes == 1


def test_what_cannot_be_held_is_never_offered(profile: Profile) -> None:
    config = make_config({"kv_capacity_tokens": 500, "num_decode": 1})
    requests = make_requests((0.0, 400, 200), (1.0, 100, 20), (2.0, 400, 200))
    run = ArrivalSimulation(config, profile, requests)
    assert run.request.request_id == 1
    run.accept(0)
    assert run.is_over
    assert run.record is not None
    assert summarise(run.record)["requests_rejected"] == 2
    with pytest.raises(VoltanaError, match="no request that an instance can hold"):
        ArrivalSimulation(config, profile, requests.sliced(2.0, 3.0))


def test_mistakes_are_refused(profile: Profile) -> None:
    with pytest.raises(VoltanaError, match="has no clock of 1111 MHz"):
        ArrivalSimulation(SimConfig(), profile, workload(1), levels_mhz=(1005, 1111))
    with pytest.raises(VoltanaError, match="penalty_j must be >= 0"):
        RoutingEnv(SimConfig(), profile, workload, penalty_j=-1.0)
    with pytest.raises(VoltanaError, match="needs reset"):
        RoutingEnv(SimConfig(), profile, workload).step(0)


@given(
    first=st.integers(-50, 50), step=st.integers(-9, 9), count=st.integers(1, 40),
    limit=st.integers(-60, 60),
)  # fmt: skip
def test_late_gaps_are_counted_as_one_by_one(first: int, step: int, count: int, limit: int) -> None:
    """In quarters, which floats hold exactly."""
    one_by_one = sum(first + k * step > limit for k in range(count))
    assert count_above(limit / 4, first / 4, step / 4, count) == one_by_one
