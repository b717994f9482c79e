"""Fair comparison of policies: within one load point, on the same requests.

A load point is everything but the policy and the seed. Energies are compared seed by seed, whose
requests are the same; an attainment is the mean over the seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from voltana.experiments.sweep.grid import STATIC_PAIR
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import KEYS

STATIC_MAX: Final = "static-max"
BEST_PAIR: Final = "best static pair"
TARGET: Final = 0.99
"""Default attainment that TTFT and ITL must both reach to count as keeping the SLO."""
SAVING: Final = "saving_pct"
KEEPS: Final = "keeps_slo"
SEED: Final = "seed"
ATTAINMENTS: Final = ("ttft_attainment", "itl_attainment")
NEEDED: Final = ("policy", "energy_j", *ATTAINMENTS)


def keeps_slo(frame: pd.DataFrame, target: float = TARGET) -> pd.Series[bool]:
    """Rows whose TTFT and ITL attainments both reach the target."""
    return worse_attainment(frame) >= target


def keeps_promise(summary: Mapping[str, Any], target: float = TARGET) -> bool:
    """Whether TTFT and ITL attainment of one run both reach the target."""
    return min(attainments_of([summary])) >= target


def attainments_of(summaries: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Means over runs. A share of no token gaps at all counts as kept."""
    rows = list(summaries)
    values = [[1.0 if s[name] is None else float(s[name]) for s in rows] for name in ATTAINMENTS]
    return tuple(sum(1.0 if v != v else v for v in of) / len(of) for of in values)


def worse_attainment(frame: pd.DataFrame) -> pd.Series[float]:
    """The lower of TTFT's and ITL's attainment, row by row."""
    return frame[list(ATTAINMENTS)].min(axis=1)


def labels_of(table: pd.DataFrame) -> list[str]:
    """A sweep's free axes: the columns before the first configuration key."""
    return list(itertools.takewhile(lambda name: name not in KEYS, map(str, table.columns)))


def load_columns(table: pd.DataFrame, series: str, x: str | None = None) -> tuple[str, ...]:
    """Columns that make up a load point: those that vary within a series, repeats apart.

    What follows from a label, or from `x`, is not named twice.

    Args:
        table: A sweep's results, one row a run.
        series: Column that names the policy.
        x: Column of the horizontal axis, a label or a key; None for none.
    """
    labels = [name for name in labels_of(table) if name != series]
    keys = [key for key in KEYS if key in table and key not in (SEED, series)]
    first = [*([x] if x in table.columns and x is not None and x != series else []), *labels]
    measured = _measured(table)
    chosen: list[str] = []
    for name in dict.fromkeys([*first, *keys]):
        if (
            name not in measured
            and _varies(table, name, by=series)
            and all(_varies(table, name, by=other) for other in chosen if other in first)
        ):
            chosen.append(name)
    return tuple(sorted(chosen, key=[*labels, *keys].index))


def add_saving(
    table: pd.DataFrame, loads: Sequence[str], series: str, baseline: str
) -> pd.DataFrame:
    """Add `saving_pct`: energy saved against the baseline at the same load and seed, in %.

    NaN where the baseline has no run of that load and seed.

    Args:
        table: One row a run, with `energy_j`.
        loads: Columns of the load point, see `load_columns`.
        series: Column that names the policy.
        baseline: Value of `series` that is compared with.
    """
    keys = [*loads, *([SEED] if SEED in table and SEED not in loads else [])]
    base = table[table[series].astype(str) == baseline]
    if not keys:
        return table.assign(**{SAVING: 100 * (1 - table["energy_j"] / base["energy_j"].mean())})
    means = base.groupby(keys, dropna=False)["energy_j"].mean().rename("baseline_j").reset_index()
    baseline_j = table[keys].merge(means, on=keys, how="left")["baseline_j"].to_numpy()
    return table.assign(**{SAVING: 100 * (1 - table["energy_j"] / baseline_j)})


def best_pairs(
    pairs: pd.DataFrame, loads: Sequence[str], *, series: str = "policy", target: float = TARGET
) -> pd.DataFrame:
    """Of static pairs the rows of the best one at each load point, on all seeds together.

    The best is the one with the least energy among those that keep the SLO; where none does, the
    one with the highest worse attainment.

    Args:
        pairs: Runs of static pairs, one row a seed.
        loads: Columns of the load point.
        series: Column that names the pair.
        target: Attainment, in 0..1, that keeps the SLO.

    Returns:
        Its rows, a seed each, with `clocks`; the series is called `BEST_PAIR`.
    """
    keys = [*loads, series]
    pairs = _on_all_seeds(pairs, loads, keys)
    means = pairs.groupby(keys, sort=False, dropna=False)[["energy_j", *ATTAINMENTS]].mean()
    means = means.reset_index()
    means = means.assign(_breaks=~keeps_slo(means, target), _worse=worse_attainment(means))
    means["_rank"] = means["energy_j"].where(~means["_breaks"], -means["_worse"])
    means = means.sort_values(["_breaks", "_rank"], kind="stable")
    best = means.drop_duplicates(list(loads)) if loads else means.head(1)
    rows = pairs.merge(best[keys], on=keys, how="inner")
    clocks = rows[series].astype(str).str.removeprefix(f"{STATIC_PAIR} ")
    rows[series] = BEST_PAIR
    return rows.assign(clocks=clocks)


def _on_all_seeds(pairs: pd.DataFrame, loads: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Without pairs that lack a seed of their load point: their mean is over other requests."""
    if SEED not in pairs:
        return pairs
    own = pairs.groupby(list(keys), dropna=False)[SEED].transform("nunique")
    groups = pairs.groupby(list(loads), dropna=False) if loads else None
    whole = pairs[SEED].nunique() if groups is None else groups[SEED].transform("nunique")
    return pairs[own == whole]


def is_static_pair(frame: pd.DataFrame, series: str = "policy") -> pd.Series[bool]:
    """Rows that are one of the fixed pairs of clocks."""
    return frame[series].astype(str).str.startswith(STATIC_PAIR)


def compare(frame: pd.DataFrame, *, target: float = TARGET) -> pd.DataFrame:
    """One row a load point and policy, with its saving; of the static pairs only the best one.

    Where a policy misses the SLO its saving does not count: every table and figure shows
    `keeps_slo` beside it.

    Args:
        frame: Tidy results of one sweep with a `policy` column.
        target: Attainment that both TTFT and ITL must reach.

    Returns:
        Rows by load point and policy: means over seeds (`repeats` of them), `saving_pct` (energy
        of the whole run against static-max, seed by seed) and `keeps_slo`.

    Raises:
        VoltanaError: A column is missing, or a load point has no `static-max` to compare with.
    """
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise VoltanaError(
            f"a comparison needs the columns {', '.join(NEEDED)}; there is no {missing[0]}: give "
            "the sweep an axis [[grid.policy]]"
        )
    loads = load_columns(frame, "policy")
    pairs = is_static_pair(frame)
    kept = frame[~pairs]
    if pairs.any():
        best = best_pairs(frame[pairs], loads, target=target)
        kept = pd.concat([kept, best], ignore_index=True)
    kept = add_saving(kept, loads, "policy", STATIC_MAX)
    if kept[SAVING].isna().any():
        where = kept[kept[SAVING].isna()].iloc[0]
        place = ", ".join(f"{n} {where[n]}" for n in ("rate_rps", *loads, SEED) if n in kept)
        raise VoltanaError(
            f"no {STATIC_MAX} at {place or 'all'}: nothing to compare with; add a policy of that "
            "name (the top clock everywhere)"
        )
    means = _over_seeds(kept, loads)
    means = means.assign(**{KEEPS: keeps_slo(means, target)})
    return means.sort_values(list(loads), kind="stable", ignore_index=True) if loads else means


def _over_seeds(frame: pd.DataFrame, loads: Sequence[str]) -> pd.DataFrame:
    """Means of what was measured, by load point and policy; what was set stays as it is."""
    measured = _measured(frame)
    how = {n: "mean" if n in measured else "first" for n in frame.columns if n != SEED}
    groups = frame.groupby([*loads, "policy"], sort=False, dropna=False)
    return groups.agg(how).assign(repeats=groups.size()).reset_index(drop=True)


def _measured(table: pd.DataFrame) -> set[str]:
    """Columns of measured numbers: those that are not configuration keys."""
    numbers = table.select_dtypes("number").columns
    labels = set(labels_of(table)) if any(key in table for key in KEYS) else set()
    return {n for n in map(str, numbers) if n not in KEYS and n not in labels}


def _varies(table: pd.DataFrame, name: str, *, by: str) -> bool:
    return bool((table.groupby(by, dropna=False)[name].nunique(dropna=False) > 1).any())
