"""Static fleets of unlike cards within a phase: what they are, and the best of them by grids."""

from __future__ import annotations

from itertools import product
from math import exp
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.frontier.fixtures import make_small_study
from voltana.experiments.frontier.search import STATIC_FLEET, STATIC_PAIR, search_frontier
from voltana.experiments.frontier.static.fleets import static_fleets
from voltana.experiments.frontier.static.like import Side
from voltana.experiments.frontier.static.unlike import Cards, Sides, UnlikeSearch
from voltana.experiments.frontier.table import frontier_table
from voltana.experiments.frontier.trial import Bench, Trial
from voltana.experiments.runs import run
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config

A100, H100 = "a100-80g-sxm/llama-3.1-8b", "h100-sxm/llama-3.1-8b"
CLOCKS = (1005, 1200, 1410)
"""That both cards have."""


@pytest.mark.parametrize("seed", range(6))
def test_the_descent_ends_at_the_best_of_all_fleets(seed: int) -> None:
    """Three kinds, 8 clocks, two instances: 4,600 fleets by brute force.

    A router shares a phase's work by speed, so that one kind's clock moves what another spends: a
    card of speed s takes s of its phase's sum of speeds. Its power is a cubic of its clock while
    it works, so that each has a valley of its own; too slow a phase misses.
    """
    rng = np.random.default_rng(seed)
    speed, fixed_w, cubic_w = (
        rng.uniform(low, high, 3).tolist() for low, high in ((0.5, 1.5), (50, 200), (100, 400))
    )
    needed = rng.uniform(0.6, 1.6, 2).tolist()
    clocks = tuple(range(500, 1551, 150))
    asked: set[tuple[Sides, bool]] = set()

    def attempt(fleet: Sides, on_all: bool) -> Trial:
        asked.add((fleet, on_all))
        energies, attainments = [], []
        for repeat in range(2 if on_all else 1):
            energy_j, misses = 0.0, 0.0
            for load, kinds in zip(needed, ((0, 1), (2,)), strict=True):
                load *= 1 + 0.02 * repeat
                rate = sum(fleet[k].active * speed[k] * fleet[k].clock_mhz / 1000 for k in kinds)
                busy = min(load / rate, 1.0)
                for k in kinds:
                    power_w = fixed_w[k] + cubic_w[k] * (fleet[k].clock_mhz / 1000) ** 3
                    energy_j += 100 + fleet[k].active * busy * power_w
                misses += 1.0 / (1.0 + exp(min((rate - 1.1 * load) / 0.02, 99.0)))
            energies.append(energy_j)
            attainments.append(1.0 - min(misses, 1.0))
        return Trial(settings={}, label="", attainments=(*attainments,), energies_j=(*energies,))

    kind = Cards(counts=(0, 1, 2), clocks_mhz=clocks, knots_mhz=clocks[::3], quiet_mhz=500)
    alone = Cards(counts=(1, 2), clocks_mhz=clocks, knots_mhz=clocks[::3], quiet_mhz=500)
    kept = [
        trial.energy_j
        for fleet in product(kind.sides, kind.sides, alone.sides)
        if fleet[0].active + fleet[1].active and (trial := attempt(fleet, True)).keeps(0.99)
    ]
    asked.clear()
    found = UnlikeSearch(attempt, cards=((kind, kind), (alone,)), target=0.99).find()
    assert found.keeps(0.99) == bool(kept)
    if kept:
        assert found.energy_j <= min(kept) * 1.002
    assert len(asked) < 1000


def test_a_fleet_is_written_with_those_in_use_first() -> None:
    """A, B, A, B in prefill: one of A and two of B in use keep their order, the other A is last."""
    study = make_small_study(
        base={"num_prefill": 4, "prefill_profiles": f"{A100}+{H100}+{A100}+{H100}"},
        static_clocks_mhz=CLOCKS,
    )  # fmt: skip
    config = make_config({**study.base, "rate_rps": 60, "duration_s": 2})
    fleets = static_fleets(config, "least-requests", study.kinds)
    assert fleets.top == (Side(2, 1410), Side(2, 1410), Side(2, 1410))
    fleet = (Side(1, 1005), Side(2, 1200), Side(2, 1410))
    settings = fleets.settings(fleet, None)
    assert settings["prefill_profiles"] == f"{A100}+{H100}+{H100}+{A100}"
    assert settings["prefill_controller"] == "static:f=1005+1200+1200+1005"
    assert (settings["active_prefill"], settings["active_decode"]) == (3, 2)
    assert fleets.label(fleet, 64) == "1005+1200/1410 MHz, 1+2P2D, at most 64 together"
    record = run(make_config({**config.as_dict(), **settings}))
    busy = [{*i.clock_busy_s} for i in record.instances if i.phase == "prefill"]
    assert busy == [{1005}, {1200}, {1200}, set()]
    unused = (Side(0, 1005), Side(2, 1200), Side(2, 1410))
    assert fleets.label(unused, None) == "–+1200/1410 MHz, 0+2P2D"
    assert fleets.settings(unused, None)["prefill_profiles"] == f"{H100}+{H100}+{A100}+{A100}"


def test_a_clock_for_each_instance_is_one_for_each() -> None:
    config = make_config({"controller": "static:f=1005+1200+1410", "duration_s": 1, "rate_rps": 5})
    with pytest.raises(VoltanaError, match=r"one for each of the 2 prefill instances, got 3: 1005"):
        run(config)


@pytest.mark.slow
def test_the_best_fleet_of_unlike_cards_of_real_runs(tmp_path: Path) -> None:
    """Three clocks a kind, one of each in prefill: all 45 fleets; by descent too; the bound."""
    base = {
        "duration_s": 4, "slo_itl_s": 0.045, "num_decode": 1,
        "prefill_profiles": f"{A100}+{H100}",
    }  # fmt: skip
    study = make_small_study(
        base=base, routers=("least-requests",), policies=("ecofreq + least-requests",),
        static_clocks_mhz=CLOCKS,
    )  # fmt: skip
    fleets = static_fleets(make_config({**base, "rate_rps": 20}), "least-requests", study.kinds)
    bench = Bench(study.base, study.loads[0], study.attainment, tmp_path)

    def attempt(fleet: Sides, on_all: bool) -> Trial:
        settings, label = fleets.settings(fleet, None), fleets.label(fleet, None)
        return bench.run(settings, label, study.tuning if on_all else study.tuning[:1])

    best = {}
    for name, least in ((STATIC_PAIR, 1), (STATIC_FLEET, 0)):
        sides = [Side(n, f) for n in range(least, 2) for f in (CLOCKS if n else (1005,))]
        decode = [Side(1, f) for f in CLOCKS]
        every = [f for f in product(sides, sides, decode) if f[0].active + f[1].active]
        trials = (attempt(fleet, True) for fleet in every)
        best[name] = min(t.energy_j for t in trials if t.keeps(study.choice_target))
    ((_, found),) = search_frontier(study, tmp_path, jobs=1)
    for name, energy_j in best.items():
        (tuned,) = [f.tuned for f in found if f.controller == name and f.tuned]
        assert tuned.energy_j == energy_j
    cards = [
        Cards(counts=counts, clocks_mhz=CLOCKS, knots_mhz=CLOCKS, quiet_mhz=1005)
        for counts in ((0, 1), (0, 1), (1,))
    ]
    descended = UnlikeSearch(
        attempt, cards=(cards[:2], cards[2:]), target=study.choice_target, exhaustive=0
    ).find()
    assert descended.energy_j == best[STATIC_FLEET]
    frame = frontier_table(study, found, tmp_path, jobs=1)
    assert (frame["times_bound"].dropna() > 1.0).all()
    assert frame["times_bound"].notna().any()
