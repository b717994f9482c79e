"""Sweep files: a base configuration and a grid over any of its keys.

```toml
[base]                       # any configuration key
workload = "sharegpt"
[grid]                       # a list of values: one point each
rate_rps = [40, 60]
seed = [13, 14]
[[grid.policy]]              # a list of tables: several keys that belong together, with a name
name = "static-max"
controller = "static"
[static_pairs]               # optional: every pair of fixed prefill and decode clocks; of
                             # colocated instances every clock
clocks_mhz = [1005, 1200, 1410]
router = "round-robin"
```
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from voltana.experiments.sweep.identity import run_key
from voltana.profiles.common.binding import check_names, table
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.sim.config import KEYS, SimConfig, make_config, read_toml

CONFIGS: Final = Path(__file__).parents[1] / "configs"
"""The sweep files that are shipped."""

STATIC_PAIR: Final = "static pair"
_SECTIONS: Final = ("base", "grid", "static_pairs")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One configuration of a sweep with the names that its figures use."""

    labels: Mapping[str, str]
    config: SimConfig

    @cached_property
    def key(self) -> str:
        """Name of its result, see `voltana.experiments.sweep.identity`.

        Taken once: it stays while a sweep runs, even if somebody edits a policy meanwhile.
        """
        return run_key(self.config)


def read_sweep(path: Path) -> list[Point]:
    """Read a sweep file. Raises VoltanaError for an unknown key or a bad value."""
    return expand(read_toml(path), str(path))


def expand(data: Mapping[str, Any], where: str) -> list[Point]:
    """Every point of the grid, in the order of the file, the last key turning fastest."""
    check_names(data, _SECTIONS, "section", where)
    base = table(data, "base", where)
    axes = [_axis(name, values, where) for name, values in table(data, "grid", where).items()]
    pairs = _static_pairs(table(data, "static_pairs", where), where)
    if pairs:
        axes = _join_policies(axes, pairs)
    points = []
    for choice in itertools.product(*axes):
        labels: dict[str, str] = {}
        values = dict(base)
        for part_labels, part_values in choice:
            labels |= part_labels
            values |= part_values
        if _is_played(labels, values):
            points.append(Point(labels=labels, config=make_config(values, where=where)))
    return points


def _is_played(labels: Mapping[str, str], values: dict[str, Any]) -> bool:
    """Of static pairs a colocated fleet plays those of one clock, as its controller."""
    is_pair = labels.get("policy", "").startswith(STATIC_PAIR)
    if not is_pair or values.get("num_colocated") is None:
        return True
    clock = values.pop("prefill_controller")
    values["controller"] = clock
    return bool(values.pop("decode_controller") == clock)


_Choice = tuple[dict[str, str], dict[str, Any]]


def _axis(name: str, values: object, where: str) -> list[_Choice]:
    if not isinstance(values, list) or not values:
        raise VoltanaError(f"grid.{name} must be a list that is not empty ({where})")
    if name in KEYS:
        return [({}, {name: value}) for value in values]
    choices: list[_Choice] = []
    for entry in values:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise VoltanaError(
                f"grid.{name} is no configuration key{nearest(name, KEYS)}; "
                f"a free axis needs tables with a name ({where})"
            )
        keys = {key: value for key, value in entry.items() if key != "name"}
        choices.append(({name: entry["name"]}, keys))
    return choices


def _static_pairs(section: Mapping[str, Any], where: str) -> list[_Choice]:
    if not section:
        return []
    extra = set(section) - {"clocks_mhz", "router"}
    clocks = section.get("clocks_mhz")
    if extra or not isinstance(clocks, list) or not clocks:
        raise VoltanaError(f"[static_pairs] takes clocks_mhz (a list) and router ({where})")
    router = section.get("router", "round-robin")
    return [
        (
            {"policy": f"{STATIC_PAIR} {p}/{d}"},
            {"prefill_controller": f"static:f={p}", "decode_controller": f"static:f={d}",
             "router": router},
        )
        for p, d in itertools.product(clocks, clocks)
    ]  # fmt: skip


def _join_policies(axes: list[list[_Choice]], pairs: list[_Choice]) -> list[list[_Choice]]:
    """Static pairs are further entries of the policy axis."""
    joined = []
    found = False
    for axis in axes:
        is_policy = "policy" in axis[0][0]
        found |= is_policy
        joined.append([*axis, *pairs] if is_policy else axis)
    return joined if found else [*joined, pairs]
