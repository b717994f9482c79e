"""`voltana train mdp`: files that serve, refusals, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.commands.test_cli import voltana
from voltana.experiments.study.train import TrainingPlan, train
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.mdp.learn.qlearn import Learner, QSettings, save_checkpoint
from voltana.sim.mdp.policy_file import load_policy

COARSE = ["--width", "32", "--max-requests", "160", "--set", "slo_itl_s=0.045"]


@pytest.mark.slow
def test_a_trained_file_serves_and_is_refused_for_another_profile(tmp_path: Path) -> None:
    """At 6 requests/s one A100 decodes it all: the other one stays asleep, and energy falls."""
    out = tmp_path / "p.npz"
    done = voltana("train", "mdp", "--rate", "6", "--out", str(out), *COARSE)
    assert done.returncode == 0, done.stderr
    assert "cost" in done.stdout
    assert "no routing below" in done.stdout
    common = ["simulate", "--rate", "6", "--duration", "20", "--slo-itl-ms", "45", "--json"]
    summaries = []
    for router in (f"mdp:policy={out}", "least-requests"):
        served = voltana(*common, "--router", router)
        assert served.returncode == 0, served.stderr
        summaries.append(json.loads(served.stdout))
    assert summaries[0]["attainment"] == 1.0
    assert summaries[0]["decode_energy_j"] < 0.8 * summaries[1]["decode_energy_j"]
    other = voltana(*common, "--router", f"mdp:policy={out}", "--profile",
                    "a100-80g-sxm/ministral-3b")  # fmt: skip
    assert other.returncode == 2
    assert "was trained for profile a100-80g-sxm/llama-3.1-8b" in other.stderr
    assert "train it again for this one" in other.stderr
    assert other.stderr.count("\n") == 1


def plan(**values: object) -> TrainingPlan:
    fixed = {
        "config": make_config({"slo_itl_s": 0.045}), "rates_rps": (6.0,), "width_requests": 32,
        "max_requests": 160, "episodes": 3, "episode_s": 5.0,
    }  # fmt: skip
    return TrainingPlan(**(fixed | values))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_instances_are_solved_exactly_by_either_solver(tmp_path: Path) -> None:
    """A pair is the whole fleet: factored and vi are the same problem. Rates are kept apart."""
    results = [
        train(plan(solver=solver, rates_rps=(6.0, 20.0)), tmp_path / f"{solver}.npz")
        for solver in ("vi", "factored", "pi")
    ]
    np.testing.assert_allclose(results[0].arrays["delta_0"], results[1].arrays["delta_0"])
    by_values, by_policies = results[0].arrays["delta_0"], results[2].arrays["delta_0"]
    scale_j = float(np.abs(by_policies).max())
    np.testing.assert_allclose(by_values, by_policies, atol=1e-2 * scale_j)
    for policy in results:
        low, cost = policy.result["lower_bound_w"], policy.result["cost_w"]
        assert cost[0] < cost[1]
        assert all(bound <= c for bound, c in zip(low, cost, strict=True))
    read = load_policy(tmp_path / "vi.npz")
    assert read.rates_rps == (6.0, 20.0)
    assert read.parameters["workload"] == "sharegpt"
    assert read.provenance["version"]


def test_free_clocks_cost_no_more(tmp_path: Path) -> None:
    """Whatever EcoFreq's clocks cost, clocks chosen with the routing cost no more."""
    tied, free = (
        train(plan(solver="vi", clock_rule=rule), tmp_path / f"{rule}.npz")
        for rule in ("ecofreq", "free")
    )
    slack = tied.result["gap_w"][0] + free.result["gap_w"][0]
    assert free.result["cost_w"][0] <= tied.result["cost_w"][0] + slack
    assert free.result["lower_bound_w"] == [None]


def test_an_interrupted_q_learning_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(plan(solver="q"), tmp_path / "whole.npz")
    real = save_checkpoint
    out = tmp_path / "p.npz"

    def interrupt(path: Path, learner: Learner, settings: QSettings, purpose: str) -> None:
        real(path, learner, settings, purpose)
        if learner.episodes == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("voltana.experiments.study.train.save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(plan(solver="q"), out)
    assert not out.exists()
    monkeypatch.setattr("voltana.experiments.study.train.save_checkpoint", real)
    resumed = train(plan(solver="q"), out)
    with pytest.raises(VoltanaError, match="exists: remove it"):
        train(plan(solver="q"), out)
    np.testing.assert_array_equal(resumed.arrays["delta_0"], whole.arrays["delta_0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.npz", "whole.npz"]
    served = voltana("simulate", "--rate", "6", "--duration", "5", "--router", f"mdp:policy={out}")
    assert served.returncode == 0, served.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_is_trained_and_serves(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3", exc_type=ImportError)
    out = tmp_path / "n.npz"
    train(plan(solver="sb3", steps=128), out)
    served = voltana("simulate", "--rate", "6", "--duration", "5", "--router", f"mdp:policy={out}")
    assert served.returncode == 0, served.stderr


MISTAKES = [
    ({"solver": "magic"}, "solver must be one of vi, pi, factored, q, sb3"),
    ({"algorithm": "magic"}, "algorithm must be ppo or dqn"),
    ({"rates_rps": ()}, "rates must be > 0 and different"),
    ({"rates_rps": (3.0, -1.0)}, "rates must be > 0 and different"),
    ({"solver": "q", "rates_rps": (3.0, 4.0)}, "q learns at one rate, got 2"),
    ({"width_requests": 0}, "width_requests must be >= 1"),
    ({"penalty_j": -1.0}, "penalty_j must be >= 0"),
    ({"clock_rule": "fast"}, "unknown controller 'fast'"),
    ({"clock_rule": "polca"}, "polca sees the whole fleet"),
    ({"solver": "vi", "config": make_config({"num_decode": 8})}, "take the factored solver"),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES)
def test_mistakes_are_refused(values: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(VoltanaError, match=words):
        train(plan(**values), tmp_path / "p.npz")
