"""The search for static fleets against exhaustive grids: closed forms, and real runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experiments.frontier.fixtures import make_small_study
from voltana.experiments.frontier.search import STATIC_CLOCK, STATIC_FLEET, STATIC_PAIR, run_task
from voltana.experiments.frontier.static.like import Clocks, Fleet, FleetSearch, Side
from voltana.experiments.frontier.trial import Bench, Trial
from voltana.experiments.runs import cached_profile

CLOCKS = tuple(range(705, 1411, 15))
KNOTS = (705, 810, 900, 1005, 1095, 1200, 1305, 1350, 1380, 1410)
OTHERS = tuple(range(510, 1981, 30))
"""Of another card: some clocks are the first one's, some are not."""
CLOCKS_OF_RUNS = (705, 855, 1005, 1110, 1200, 1410)
REPEATS = 3
Law = Callable[[Fleet, int], tuple[float, float]]
"""A fleet and a repeat -> attainment and energy (J)."""


def random_law(seed: int) -> Law:
    """Each side a valley in its clock whose place and depth depend on the number of instances.

    Attainment falls on each side below a clock of its own, at another place in each repeat; both
    sides' misses add. A part of the energy (2 %) is no sum of the two.
    """
    rng = np.random.default_rng(seed)
    bottom, steep = rng.uniform(600, 1300, (2, 3)), rng.uniform(0.05, 0.6, (2, 3))
    level = np.sort(rng.uniform(20e3, 40e3, (2, 3)), axis=1)
    limit = np.sort(rng.uniform(500, 1300, (2, 3)), axis=1)[:, ::-1]
    shift = rng.normal(0, 25, (2, REPEATS))
    mixed = rng.uniform(0, 0.02)

    def law(fleet: Fleet, repeat: int) -> tuple[float, float]:
        misses, energy_j = 0.0, 0.0
        shares = []
        for phase, side in enumerate(fleet):
            at = side.active - 1
            x = side.clock_mhz - bottom[phase, at]
            energy_j += level[phase, at] + steep[phase, at] * x * x / 40
            over = side.clock_mhz - limit[phase, at] - shift[phase, repeat]
            misses += 1.0 / (1.0 + np.exp(over / 12.0))
            shares.append(side.clock_mhz / 1410)
        return 1.0 - min(misses, 1.0), float(energy_j * (1.0 + mixed * shares[0] * shares[1]))

    return law


def try_fleet(law: Law, asked: set[tuple[Fleet, bool]]) -> Callable[[Fleet, bool], Trial]:
    def attempt(fleet: Fleet, on_all: bool) -> Trial:
        asked.add((fleet, on_all))
        points = [law(fleet, r) for r in range(REPEATS if on_all else 1)]
        attainments, energies = zip(*points, strict=True)
        return Trial(settings={}, label="", attainments=attainments, energies_j=energies)

    return attempt


@pytest.mark.parametrize("clocks", [(CLOCKS, CLOCKS), (CLOCKS, OTHERS), (OTHERS, CLOCKS)])
@pytest.mark.parametrize("seed", [3, 7, 15, 22, 30, 39])
def test_the_best_fleet_is_that_of_all_fleets(seed: int, clocks: Clocks) -> None:
    """About 50 clocks a phase, one or two instances each: 9,000 fleets by brute force."""
    law, counts = random_law(seed), (1, 2)
    asked: set[tuple[Fleet, bool]] = set()
    attempt = try_fleet(law, asked)
    prefill, decode = ([Side(n, f) for n, f in product(counts, own)] for own in clocks)
    kept = [
        (trial.energy_j, fleet)
        for fleet in product(prefill, decode)
        if (trial := attempt(fleet, True)).keeps(0.99)
    ]
    asked.clear()
    knots = (clocks[0][::5], clocks[1][::5])
    found = FleetSearch(
        attempt, clocks_mhz=clocks, knots_mhz=knots, counts=(counts, counts), target=0.99
    ).find()
    if not kept:
        assert not found.keeps(0.99)
        return
    assert found.keeps(0.99)
    assert found.energy_j <= min(kept)[0] * 1.001
    assert len(asked) < 250  # 3 % of the fleets


def test_a_target_out_of_reach_gives_the_nearest_miss() -> None:
    asked: set[tuple[Fleet, bool]] = set()

    def law(fleet: Fleet, repeat: int) -> tuple[float, float]:
        return 0.9 * sum(s.clock_mhz for s in fleet) / 2820, 1.0

    found = FleetSearch(
        try_fleet(law, asked),
        clocks_mhz=(CLOCKS, CLOCKS),
        knots_mhz=(KNOTS, KNOTS),
        counts=((2,), (2,)),
        target=0.99,
    ).find()
    assert found.worst_attainment == pytest.approx(0.9)
    assert len(asked) < 40


@pytest.mark.slow
@pytest.mark.parametrize("router", ["round-robin", "ecoroute", "consolidate"])
@pytest.mark.parametrize("rate_rps", [8, 30])
def test_the_best_fleet_of_real_runs(tmp_path: Path, router: str, rate_rps: float) -> None:
    """Six clocks a phase, 2P2D with rest: all 144 fleets on both tuning seeds."""
    study = make_small_study(
        base={"duration_s": 10, "slo_itl_s": 0.045, "slo_ttft_s": 0.4},
        load={"rate_rps": rate_rps}, routers=(router,),
        static_clocks_mhz=CLOCKS_OF_RUNS,
    )  # fmt: skip
    found = {f.controller: f for f in run_task((study, study.loads[0], router, tmp_path))}
    least = {STATIC_PAIR: np.inf, STATIC_FLEET: np.inf}
    for prefill, decode, n, m in product(CLOCKS_OF_RUNS, CLOCKS_OF_RUNS, (1, 2), (1, 2)):
        settings = {
            "prefill_controller": f"static:f={prefill}", "decode_controller": f"static:f={decode}",
            "active_prefill": n, "active_decode": m, "router": router,
        }  # fmt: skip
        trial = bench(study, tmp_path).run(
            settings, "", study.tuning, stop_below=study.choice_target
        )
        if trial.keeps(study.choice_target):
            least[STATIC_FLEET] = min(least[STATIC_FLEET], trial.energy_j)
            if (n, m) == (2, 2):
                least[STATIC_PAIR] = min(least[STATIC_PAIR], trial.energy_j)
    for name, energy_j in least.items():
        tuned = found[name].tuned
        assert tuned is not None
        assert tuned.keeps(study.choice_target) == np.isfinite(energy_j)
        if np.isfinite(energy_j):
            assert tuned.energy_j <= energy_j * 1.001


@pytest.mark.parametrize(
    ("fleet", "controller", "actives"),
    [
        ({"num_colocated": 2}, STATIC_FLEET, [{"active_colocated": n} for n in (1, 2)]),
        ({"num_prefill": 1, "num_decode": 2}, STATIC_CLOCK, [{"active_decode": n} for n in (1, 2)]),
    ],
)
def test_the_best_single_clock_of_real_runs(
    tmp_path: Path, fleet: dict[str, int], controller: str, actives: list[dict[str, int]]
) -> None:
    """Three clocks, one instance or two: all six fleets on both tuning seeds."""
    router = "least-requests"
    study = make_small_study(
        base={"duration_s": 5, "slo_itl_s": 0.045, "slo_ttft_s": 0.4, **fleet},
        load={"rate_rps": 6}, routers=(router,), static_clocks_mhz=(705, 1005, 1410),
        one_clock=True,
    )  # fmt: skip
    found = {f.controller: f for f in run_task((study, study.loads[0], router, tmp_path))}
    trials = [
        bench(study, tmp_path).run(
            {"controller": f"static:f={clock}", "router": router, **active}, "", study.tuning
        )
        for clock, active in product((705, 1005, 1410), actives)
    ]
    best = min((t for t in trials if t.keeps(study.choice_target)), key=lambda t: t.energy_j)
    tuned = found[controller].tuned
    assert tuned is not None
    assert tuned.energy_j == best.energy_j
    clock = best.settings["controller"].partition("=")[2]
    assert tuned.label.startswith(f"{clock} MHz")
    judged = found[controller].judged
    assert set(judged.rows["seed"]) == {11, 12, 13}


def bench(study: Any, directory: Path) -> Any:  # noqa: ANN401
    return Bench(study.base, study.loads[0], study.attainment, directory)


def test_the_search_starts_from_the_profiles_own_clocks() -> None:
    study = make_small_study()
    for (kind,) in study.kinds:
        assert kind.clocks_mhz == cached_profile("a100-80g-sxm/llama-3.1-8b").clocks_mhz
        assert set(kind.knots_mhz) >= {705, 1005, 1200, 1410}
        assert len(kind.knots_mhz) < len(kind.clocks_mhz) / 3
