"""stable-baselines3 learns on the environment, and what is exported decides as it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.learn.deep import Algorithm, DeepSettings, export, fit
from voltana.sim.mdp.learn.env import RoutingEnv
from voltana.sim.mdp.observation import size
from voltana.sim.mdp.policy_file import PolicyFile, load_policy
from voltana.sim.mdp.router import forward
from voltana.sim.workload.generate import make_workload

pytest.importorskip("stable_baselines3", exc_type=ImportError)
torch = pytest.importorskip("torch", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_the_exported_network_acts_as_the_model(algorithm: Algorithm, tmp_path: Path) -> None:
    profile = load_profile("a100-80g-sxm/llama-3.1-8b")
    env = RoutingEnv(
        make_config({"num_decode": 3}),
        profile,
        lambda seed: make_workload("sharegpt", rate_rps=20.0, duration_s=5.0, seed=seed),
        drains=False,
    )
    seen: list[int] = []
    settings = DeepSettings(algorithm=algorithm, steps=256, hidden=16)
    model = fit(env, settings, progress=seen.append)
    assert seen[-1] >= 256
    policy = PolicyFile(
        kind="network", solver="sb3", profile=profile.name, profile_hash="0", num_instances=3,
        rates_rps=(20.0,), parameters={}, seeds=(1,), provenance={}, result={},
        grid=StateGrid(batch_edges_requests=(0, 1, 9), kv_nodes_tokens=(1.0,), levels_mhz=(1,)),
        arrays=dict(export(model, algorithm)),
    )  # fmt: skip
    policy.save(tmp_path / "p.npz")
    arrays = load_policy(tmp_path / "p.npz").arrays
    seeds = np.random.default_rng(1)
    views = seeds.random((200, size(3)), dtype=np.float32) * 3.0
    wanted = [int(model.predict(view, deterministic=True)[0]) for view in views]
    assert [int(np.argmax(forward(arrays, view))) for view in views] == wanted
    tensor = torch.as_tensor(views)
    with torch.no_grad():
        if algorithm == "dqn":
            expected = model.q_net(tensor).numpy()
        else:
            expected = model.policy.get_distribution(tensor).distribution.logits.numpy()
    got = np.stack([forward(arrays, view) for view in views])
    if algorithm == "ppo":  # logits are known up to a constant a row
        got = got - np.log(np.exp(got).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(VoltanaError, match="steps must be >= 1"):
        DeepSettings(steps=0)
