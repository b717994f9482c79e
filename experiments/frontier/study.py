"""What `voltana frontier` reads: a file, or the options of the command line.

```toml
[frontier]
question = "…"                       # optional, printed above the tables
target = 0.99
attainment = "attainment"            # or ttft_attainment, itl_attainment, worse (of the two)
tuning_seeds = [1, 2, 3]             # knobs and clocks are chosen on these
seeds = [11, 12, 13, 14, 15]         # and judged on these, one repeat each
trace_parts = 8                      # or: that many equal parts of the trace, one repeat each;
tuning_parts = [0, 3, 6]             # chosen on these, judged on the others, or on
judging_parts = [1, 4, 7]            # optional: these of them
routers = ["round-robin", "ecoroute"]  # static clocks are searched under each, and
controllers = ["ecofreq", "ecomin"]  # each of these meets each router
policies = ["ecomin:headroom={0.5..0} + slo-pack"]  # optional: further pairs
static_clocks_mhz = [705, 1005, 1410]  # optional: the only clocks of static pairs
static_caps = [256]                  # optional: static pairs also with such a max_running_requests
static_one_clock = true              # optional: also the best single clock of both phases
[base]                               # configuration keys
[[load]]                             # one or more
name = "20 requests/s"
rate_rps = 20
[[controller]]                       # optional: a controller with a name, or for some routers only
rule = "ecofreq:frequencies=705+1005+1200+1410"
name = "ecofreq, 4 levels"
routers = ["ecoroute"]
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

from voltana.experiments.frontier.contenders import Contender, parse_contender
from voltana.experiments.frontier.search import Study
from voltana.experiments.frontier.static.fleets import CardKind, Kinds
from voltana.experiments.frontier.trial import Load
from voltana.experiments.runs import phase_profiles, trace_of
from voltana.profiles.common.binding import check_names, table, tables, value, values
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config, read_toml
from voltana.sim.policies.parts.clocks import clock_list
from voltana.sim.policies.registry import check_policies
from voltana.sim.workload.fetch import in_data_folder

SEEDS: Final = (11, 12, 13, 14, 15)
TUNING_SEEDS: Final = (1, 2, 3)
ROUTERS: Final = ("round-robin",)
_OF_SEEDS: Final = ("seed",)
_OF_PARTS: Final = ("seed", "trace_start_s", "duration_s")
"""What each repeat sets, where repeats are seeds or parts of a trace."""
_OF_POLICIES: Final = (
    "controller", "prefill_controller", "decode_controller", "router", "active_prefill",
    "active_decode", "active_colocated",
)  # fmt: skip
_SECTIONS: Final = ("frontier", "base", "load", "controller", "policy")
_KEYS: Final = (
    "question", "target", "attainment", "seeds", "tuning_seeds", "trace_parts", "tuning_parts",
    "judging_parts", "routers", "controllers", "policies", "static_clocks_mhz",
    "static_caps", "static_one_clock",
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
    base = _in_data({**table(data, "base", where), **settings})
    loads = _loads(tables(data, "load", where), load_names, where)
    for config in (make_config({**base, **load.settings}) for load in loads):
        if config.trace is not None:
            trace_of(config)  # before anything runs
    tuning, judging = _repeats(options, base, loads, where)
    routers = values(options, "routers", str, ROUTERS, where)
    study = make_study(
        base,
        loads,
        _contenders(data, options, routers, where),
        target=value(options, "target", float, 0.99, where) if target is None else target,
        attainment=attainment or value(options, "attainment", str, "attainment", where),
        tuning=tuning,
        judging=judging,
        routers=routers,
        static_clocks_mhz=values(options, "static_clocks_mhz", int, (), where),
        static_caps=values(options, "static_caps", int, (), where),
        one_clock=value(options, "static_one_clock", bool, False, where),
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

    Args:
        settings: Configuration keys that all runs share.
        rates_rps: Loads, in requests/s.
        policies: Pairs, as in a study's file.
        num_seeds: Seeds to judge on, at most as many to tune on.
        target: Attainment, in 0..1.
        attainment: Which attainment is meant, a metric's name.

    Raises:
        VoltanaError: A setting that would change nothing, or a bad value.
    """
    check_settings(settings, [{"rate_rps": None}], _OF_SEEDS, "use --rate, --seeds and --policy")
    seeds = range(SEEDS[0], SEEDS[0] + (num_seeds or len(SEEDS)))
    return make_study(
        settings,
        [Load(name=f"{r:g} requests/s", settings={"rate_rps": r}) for r in rates_rps or [30.0]],
        [parse_contender(p) for p in policies or ("ecofreq + ecoroute", "ecomin + ecoroute")],
        target=0.99 if target is None else target,
        attainment=attainment or "attainment",
        tuning=[{"seed": seed} for seed in TUNING_SEEDS[: len(seeds)]],
        judging=[{"seed": seed} for seed in seeds],
    )


def check_settings(
    settings: Mapping[str, Any],
    loads: Sequence[Mapping[str, Any]],
    of_repeats: Sequence[str],
    where: str,
) -> None:
    """Refuse a setting that loads, repeats or policies would set again.

    Args:
        settings: Keys that all runs share.
        loads: Keys of each load.
        of_repeats: Keys that repeats set.
        where: What to do instead: the end of the message.

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


def load_names_of(path: Path) -> list[str]:
    """Names of a file's loads."""
    data, where = read_toml(path), str(path)
    return [load.name for load in _loads(tables(data, "load", where), (), where)]


def _in_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """Find a trace in the user's data folder if there is no such file here."""
    trace = values.get("trace")
    is_bare = isinstance(trace, str) and not Path(trace).is_file()
    found = in_data_folder(trace) if is_bare and trace is not None else None
    return {**values, "trace": str(found)} if found is not None else dict(values)


def _loads(entries: Sequence[Mapping[str, Any]], chosen: Sequence[str], where: str) -> list[Load]:
    loads = [
        Load(
            name=str(values.get("name", f"load {i + 1}")), settings=_in_data(_without_name(values))
        )
        for i, values in enumerate(entries or [{}])
    ]
    check_names(chosen, [load.name for load in loads], "load", where)
    return [load for load in loads if not chosen or load.name in chosen]


def _contenders(
    data: Mapping[str, Any], options: Mapping[str, Any], routers: Sequence[str], where: str
) -> list[Contender]:
    """Every controller under every router, then the further policies."""
    entries = [{"rule": rule} for rule in values(options, "controllers", str, (), where)]
    contenders = []
    for entry in [*entries, *tables(data, "controller", where)]:
        check_names(entry, ("rule", "name", "routers"), "key", f"{where}, [[controller]]")
        rule = value(entry, "rule", str, "", where)
        name = {"name": entry["name"]} if "name" in entry else {}
        own = values(entry, "routers", str, routers, where)
        contenders += [parse_contender(f"{rule} + {router}", name) for router in own]
    contenders += [parse_contender(text) for text in values(options, "policies", str, (), where)]
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
    tuning: Sequence[Mapping[str, Any]],
    judging: Sequence[Mapping[str, Any]],
    routers: Sequence[str] = (),
    static_clocks_mhz: Sequence[int] = (),
    static_caps: Sequence[int] = (),
    one_clock: bool = False,
) -> Study:
    """A study with every configuration checked and its clocks and routers made out.

    Args:
        base: Configuration keys of all runs.
        loads: What is compared on.
        contenders: Policies with a knob each.
        target: Attainment to keep.
        attainment: Which one.
        tuning: Keys of each repeat on which knobs and clocks are chosen.
        judging: Keys of each repeat that is reported.
        routers: Static pairs are searched under these and those of the contenders.
        static_clocks_mhz: The only clocks of static pairs; empty takes all of the profile.
        static_caps: Largest decode batches that static pairs are searched with, too.
        one_clock: Static fleets are searched with one clock for both phases, too.

    Raises:
        VoltanaError: A name comes twice, or a value that no run accepts.
    """
    policies = [f"{c.controller} + {c.router}" for c in contenders]
    for names in ([x.name for x in loads], policies):
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise VoltanaError(f"two loads or policies are called {twice.pop()!r}: name them")
    every_router = tuple(dict.fromkeys([*(routers or ROUTERS), *(c.router for c in contenders)]))
    for router in every_router:
        check_policies("static", router)
    configs = [make_config({**base, **load.settings}) for load in loads]
    if not configs:
        raise VoltanaError("a frontier needs a load at least")
    profiles = {(c.profile, c.prefill_profiles, c.decode_profiles) for c in configs}
    if len(profiles) != 1:
        names = sorted({str(name) for of in profiles for name in of if name is not None})
        raise VoltanaError(f"the loads of a frontier share their profiles, got {names}")
    kinds = _kinds(configs[0], static_clocks_mhz)
    clocks = {kind.clocks_mhz for of_phase in kinds for kind in of_phase}
    if one_clock and (len(clocks) > 1 or any(len(of_phase) > 1 for of_phase in kinds)):
        cards = dict.fromkeys(kind.name for of_phase in kinds for kind in of_phase)
        raise VoltanaError(
            "static_one_clock needs like cards within a phase, with the same clocks in both, got "
            f"{' and '.join(cards)}: leave it out"
        )
    return Study(
        base=base, loads=loads, contenders=contenders, tuning=tuning, judging=judging,
        kinds=kinds, routers=every_router, static_caps=tuple(static_caps), target=target,
        attainment=attainment, one_clock=one_clock,
    )  # fmt: skip


def _kinds(config: SimConfig, static_clocks_mhz: Sequence[int]) -> Kinds:
    prefill, decode = (
        tuple(
            CardKind.of(
                name,
                p,
                clock_list(p.clocks_mhz, static_clocks_mhz, p.clocks_mhz, "static_clocks_mhz"),
            )
            for name, p in of_phase.items()
        )
        for of_phase in phase_profiles(config)
    )
    return prefill, decode


_Repeats = list[dict[str, Any]]


def _repeats(
    options: Mapping[str, Any], base: Mapping[str, Any], loads: Sequence[Load], where: str
) -> tuple[_Repeats, _Repeats]:
    """Seeds, or the parts of a trace: of a trace all seeds would send the same requests."""
    seeds = values(options, "seeds", int, SEEDS, where)
    tuning_seeds = values(options, "tuning_seeds", int, TUNING_SEEDS, where)
    both = set(seeds) & set(tuning_seeds)
    if both:
        raise VoltanaError(f"seed {both.pop()} is in tuning_seeds and in seeds: take another")
    if "trace_parts" not in options:
        return [{"seed": s} for s in tuning_seeds], [{"seed": s} for s in seeds]
    count = value(options, "trace_parts", int, 1, where)
    tuning = values(options, "tuning_parts", int, range(0, count, 3), where)
    configs = [make_config({**base, **load.settings}) for load in loads]
    traces = {config.trace for config in configs}
    if None in traces or len(traces) != 1 or count < 2:
        raise VoltanaError(f"trace_parts needs one trace for all loads and must be >= 2 ({where})")
    rest = [i for i in range(count) if i not in tuning]
    judging = values(options, "judging_parts", int, rest, where)
    for name, chosen, known in (
        ("tuning_parts", tuning, range(count)),
        ("judging_parts", judging, rest),
    ):
        if not chosen or not set(chosen) <= set(known):
            raise VoltanaError(f"{name} must be some of {[*known]}, got {[*chosen]} ({where})")
    part_s = trace_of(configs[0]).duration_s / count
    parts = [
        {"trace_start_s": i * part_s, "duration_s": part_s, "seed": seeds[0] + i}
        for i in range(count)
    ]
    return [parts[i] for i in tuning], [parts[i] for i in judging]


def _without_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "name"}
