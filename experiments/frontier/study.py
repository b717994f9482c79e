"""What `voltana frontier` reads: a file, or the options of the command line.

```toml
[frontier]
question = "…"                       # optional, printed above the tables
target = 0.99
attainment = "attainment"            # or ttft_attainment, itl_attainment, worse (of the two)
seeds = [11, 12, 13, 14, 15]         # one repeat each
trace_parts = 5                      # or: that many equal parts of the trace, one repeat each
policies = ["ecofreq + ecoroute", "ecomin:headroom={0.5..0} + slo-pack"]
static_router = "round-robin"        # optional, of static-max and the static pairs
static_clocks_mhz = [705, 1005, 1410]  # optional, where the search for the best pair starts
[base]                               # configuration keys
[[load]]                             # one or more
name = "20 requests/s"
rate_rps = 20
[[policy]]                           # optional: a policy that needs further keys
rule = "ecomin + ecoroute"
name = "ecomin, exact predictor"
predictor = "table"
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from experiments.frontier.contenders import Contender, parse_contender
from experiments.frontier.search import Load, Study
from experiments.runs import cached_profile
from experiments.sweep.sections import check_names, table, tables, value, values
from profiles.errors import VoltanaError
from sim.config import make_config, read_toml
from sim.policies.clocks import clock_list, spread_clocks_mhz
from sim.policies.registry import check_policies
from sim.workload.traces import open_trace

SEEDS: Final = (11, 12, 13, 14, 15)
COARSE_LEVELS: Final = 8
_OF_SEEDS: Final = ("seed",)
_OF_PARTS: Final = ("seed", "trace_start_s", "duration_s")
"""What each repeat sets, where repeats are seeds or parts of a trace."""
_OF_POLICIES: Final = ("controller", "prefill_controller", "decode_controller", "router")
_SECTIONS: Final = ("frontier", "base", "load", "policy")
_KEYS: Final = (
    "question", "target", "attainment", "seeds", "trace_parts", "policies", "static_router",
    "static_clocks_mhz",
)  # fmt: skip


def read_study(
    path: Path,
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    load_names: Sequence[str] = (),
    target: float | None = None,
    attainment: str | None = None,
) -> tuple[Study, str]:
    """Read a frontier file; returns the study and its question.

    Args:
        path: TOML file, see the module's text.
        settings: Configuration keys that replace those of [base].
        load_names: Of the file's loads only these; empty takes all.
        target: Replaces the file's.
        attainment: Replaces the file's.

    Raises:
        VoltanaError: An unknown section or key (the nearest is suggested), or a bad value.
    """
    data, where = read_toml(path), str(path)
    options = table(data, "frontier", where)
    check_names(data, _SECTIONS, "section", where)
    check_names(options, _KEYS, "key", where)
    parts = options.get("trace_parts")
    of_repeats = _OF_SEEDS if parts is None else _OF_PARTS
    check_settings(settings, tables(data, "load", where), of_repeats, where)
    study = make_study(
        {**table(data, "base", where), **settings},
        _loads(tables(data, "load", where), load_names, where),
        _contenders(data, options, where),
        target=value(options, "target", float, 0.99, where) if target is None else target,
        attainment=attainment or value(options, "attainment", str, "attainment", where),
        seeds=values(options, "seeds", int, SEEDS, where),
        trace_parts=None if parts is None else value(options, "trace_parts", int, 1, where),
        static_router=value(options, "static_router", str, "round-robin", where),
        static_clocks_mhz=values(options, "static_clocks_mhz", int, (), where),
    )
    return study, value(options, "question", str, "", where)


def quick_study(
    settings: Mapping[str, Any],
    rates_rps: Sequence[float] | None,
    policies: Sequence[str] | None,
    num_seeds: int | None,
    target: float | None,
    attainment: str | None,
) -> Study:
    """The study of the command line's options; None is the default of each.

    Raises:
        VoltanaError: A setting that would change nothing, or a bad value.
    """
    check_settings(settings, [{"rate_rps": None}], _OF_SEEDS, "use --rate, --seeds and --policy")
    return make_study(
        settings,
        [Load(name=f"{r:g} requests/s", settings={"rate_rps": r}) for r in rates_rps or [30.0]],
        [parse_contender(p) for p in policies or ("ecofreq + ecoroute", "ecomin + ecoroute")],
        target=0.99 if target is None else target,
        attainment=attainment or "attainment",
        seeds=range(11, 11 + (num_seeds or len(SEEDS))),
    )


def check_settings(
    settings: Mapping[str, Any],
    loads: Sequence[Mapping[str, Any]],
    of_repeats: Sequence[str],
    where: str,
) -> None:
    """Refuse a setting that loads, repeats or policies would set again.

    Raises:
        VoltanaError: There is one.
    """
    of_loads = {key for load in loads for key in load} - {"name"}
    for key in settings:
        owner = next(
            (name for name, keys in (("loads", of_loads), ("repeats", of_repeats),
                                     ("policies", _OF_POLICIES)) if key in keys), None,
        )  # fmt: skip
        if owner is not None:
            raise VoltanaError(
                f"--set {key} would change nothing: the {owner} set it themselves ({where})"
            )


def _loads(entries: Sequence[Mapping[str, Any]], chosen: Sequence[str], where: str) -> list[Load]:
    loads = [
        Load(name=str(values.get("name", f"load {i + 1}")), settings=_without_name(values))
        for i, values in enumerate(entries or [{}])
    ]
    check_names(chosen, [load.name for load in loads], "load", where)
    return [load for load in loads if not chosen or load.name in chosen]


def _contenders(data: Mapping[str, Any], options: Mapping[str, Any], where: str) -> list[Contender]:
    contenders = [parse_contender(text) for text in values(options, "policies", str, (), where)]
    for entry in tables(data, "policy", where):
        if not isinstance(entry.get("rule"), str):
            raise VoltanaError(f"a [[policy]] needs rule = 'controller + router' ({where})")
        rest = {k: v for k, v in entry.items() if k != "rule"}
        contenders.append(parse_contender(entry["rule"], rest))
    return contenders


def make_study(
    base: Mapping[str, Any],
    loads: Sequence[Load],
    contenders: Sequence[Contender],
    *,
    target: float,
    attainment: str,
    seeds: Sequence[int] = SEEDS,
    trace_parts: int | None = None,
    static_router: str = "round-robin",
    static_clocks_mhz: Sequence[int] = (),
) -> Study:
    """A study with every configuration checked and its repeats and clocks made out.

    Raises:
        VoltanaError: A name comes twice, or a value that no run accepts.
    """
    for names in ([x.name for x in loads], [c.name for c in contenders]):
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise VoltanaError(f"two loads or policies are called {twice.pop()!r}: name them")
    check_policies("static", static_router)
    configs = [make_config({**base, **load.settings}) for load in loads]
    if not configs:
        raise VoltanaError("a frontier needs a load at least")
    profiles = {c.profile for c in configs}
    if len(profiles) != 1:
        raise VoltanaError(f"the loads of a frontier share one profile, got {sorted(profiles)}")
    clocks = cached_profile(profiles.pop()).clocks_mhz
    coarse = spread_clocks_mhz(clocks, clocks[0], COARSE_LEVELS)
    return Study(
        base=base,
        loads=loads,
        contenders=contenders,
        repeats=_repeats(configs[0].trace, seeds, trace_parts),
        clocks_mhz=clocks,
        coarse_mhz=clock_list(clocks, static_clocks_mhz, coarse, "static_clocks_mhz"),
        static_router=static_router,
        target=target,
        attainment=attainment,
    )


def _repeats(
    trace: str | None, seeds: Sequence[int], trace_parts: int | None
) -> list[dict[str, Any]]:
    """Seeds, or the parts of a trace: of a trace all seeds would send the same requests."""
    if trace_parts is None:
        return [{"seed": int(seed)} for seed in seeds]
    if trace is None or trace_parts < 1:
        raise VoltanaError("trace_parts needs a trace in [base] and must be >= 1")
    part_s = open_trace(trace).duration_s / trace_parts
    return [
        {"trace_start_s": i * part_s, "duration_s": part_s, "seed": int(seeds[0])}
        for i in range(trace_parts)
    ]


def _without_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "name"}
