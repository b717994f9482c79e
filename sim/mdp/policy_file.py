"""The file of a routing policy: what was solved or learned, for which profile, and how.

A NumPy archive (.npz) without pickled objects: `meta`, a JSON text, and arrays by kind:

- table: `delta_k`, the long-run cost of sending a request to each member of group k, which are
  the instances in order, by the states of all members. Shape (rates, S, …, S, members), J.
- network: `weight_k`, `bias_k` for layers k = 0, 1, …: rectified in between, an action a row at
  the end, the greatest value wins.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import replacing
from voltana.sim.mdp.grid import StateGrid
from voltana.sim.mdp.observation import size

PolicyKind = Literal["table", "network"]
POLICY_KINDS: Final = ("table", "network")
FORMAT: Final = "voltana-mdp-policy"
VERSION: Final = 1
_KEYS: Final = (
    "kind", "solver", "profile", "profile_hash", "num_instances", "rates_rps", "grid",
    "parameters", "seeds", "provenance", "result",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A policy and where it comes from."""

    kind: PolicyKind
    solver: str
    """vi, factored, q, or sb3."""
    profile: str
    profile_hash: str
    num_instances: int
    """Decode instances it was made for."""
    rates_rps: tuple[float, ...]
    """Arrival rates it was made at, ascending; the tables have one entry for each."""
    grid: StateGrid
    parameters: Mapping[str, Any]
    """Parameters of the model and of the training; names end in their unit."""
    seeds: tuple[int, ...]
    """Seeds of the training; empty for a solver that draws no random numbers."""
    provenance: Mapping[str, Any]
    """Versions, command and date."""
    result: Mapping[str, Any]
    """What the solver reports: cost, bounds, episodes."""
    arrays: Mapping[str, npt.NDArray[Any]]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        meta = {key: getattr(self, key) for key in _KEYS if key != "grid"}
        meta |= {"format": FORMAT, "version": VERSION, "grid": _grid_json(self.grid)}
        text = np.array(json.dumps(meta, sort_keys=True, default=dict))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, meta=text, **dict(self.arrays))


def load_policy(path: Path, *, profile_hash: str | None = None) -> PolicyFile:
    """Read a policy file.

    Args:
        path: File written by `PolicyFile.save`.
        profile_hash: Content hash of the profile it is to be used with; None skips the check.

    Raises:
        VoltanaError: There is no such file, it is no policy, or it was made for another profile.
    """
    meta, arrays = _read(path)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise VoltanaError(
            f"{path} is no routing policy of version {VERSION}: make one with voltana train mdp"
        )
    missing = [key for key in _KEYS if key not in meta]
    if missing or meta["kind"] not in POLICY_KINDS:
        raise VoltanaError(f"{path} lacks {(missing or ['kind'])[0]}: train the policy again")
    if profile_hash is not None and meta["profile_hash"] != profile_hash:
        raise VoltanaError(
            f"{path} was trained for profile {meta['profile']} (hash {meta['profile_hash'][:12]}),"
            f" this run's profile has hash {profile_hash[:12]}: train it again for this one"
        )
    grid = meta["grid"]
    policy = PolicyFile(
        grid=StateGrid(**{name: tuple(values) for name, values in grid.items()}),
        rates_rps=tuple(meta["rates_rps"]),
        seeds=tuple(meta["seeds"]),
        arrays=arrays,
        **{key: meta[key] for key in _KEYS if key not in ("grid", "rates_rps", "seeds")},
    )
    _check_arrays(policy, path)
    return policy


def _read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    if not path.is_file():
        raise VoltanaError(f"no such policy file: {path}: make one with voltana train mdp")
    if not zipfile.is_zipfile(path):
        raise VoltanaError(f"{path} is not a policy file (no NumPy archive)")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(str(arrays.pop("meta")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise VoltanaError(f"{path} is not a policy file ({type(error).__name__})") from None
    if not isinstance(meta, dict):
        raise VoltanaError(f"{path} is not a policy file (its meta is no table)")
    return meta, arrays


def _check_arrays(policy: PolicyFile, path: Path) -> None:
    good = _is_table(policy) if policy.kind == "table" else _is_network(policy)
    if not good or not policy.rates_rps:
        raise VoltanaError(f"{path} has arrays that do not fit its grid: train the policy again")


def _is_table(policy: PolicyFile) -> bool:
    """Whether the groups have an entry for each rate and state, and the fleet's members."""
    rates, states = len(policy.rates_rps), policy.grid.num_states
    for name, values in policy.arrays.items():
        members = values.shape[-1] if values.ndim else 0
        if not name.startswith("delta_") or values.shape != (rates, *(states,) * members, members):
            return False
    return sum(len(group) for group in group_members(policy.arrays)) == policy.num_instances


def _is_network(policy: PolicyFile) -> bool:
    """Whether the layers fit together, from an observation to one output an instance."""
    layers = sum(name.startswith("weight_") for name in policy.arrays)
    names = {f"{part}_{k}" for k in range(layers) for part in ("weight", "bias")}
    if layers == 0 or names != set(policy.arrays):
        return False
    width = size(policy.num_instances)
    for k in range(layers):
        weight, bias = policy.arrays[f"weight_{k}"], policy.arrays[f"bias_{k}"]
        if bias.ndim != 1 or weight.shape != (len(bias), width):
            return False
        width = len(bias)
    return width == policy.num_instances


def group_members(arrays: Mapping[str, npt.NDArray[Any]]) -> list[range]:
    """The instances of each group of a table."""
    groups: list[range] = []
    while (name := f"delta_{len(groups)}") in arrays:
        first = groups[-1].stop if groups else 0
        groups.append(range(first, first + arrays[name].shape[-1]))
    return groups


def _grid_json(grid: StateGrid) -> dict[str, list[float]]:
    return {
        "batch_edges_requests": list(grid.batch_edges_requests),
        "kv_nodes_tokens": list(grid.kv_nodes_tokens),
        "levels_mhz": list(grid.levels_mhz),
    }
