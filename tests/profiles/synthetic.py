"""Small profiles made of closed forms, for tests whose answers are known by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from voltana.profiles.catalog import Profile, write_profile
from voltana.profiles.schema import (
    QUANTITIES,
    ClocksMeta,
    EngineMeta,
    GpuMeta,
    ModelMeta,
    ProfileMeta,
    Provenance,
)

Surface = Callable[[str, int, int, float], float]
"""(phase, clock in MHz, batch size, tokens) -> value"""


def constant_time_s(phase: str, clock: int, batch: int, tokens: float) -> float:
    """Half a second whatever happens: exact in binary."""
    return 0.5


def scaling_time_s(phase: str, clock: int, batch: int, tokens: float) -> float:
    """A + B/f with work that grows with batch and tokens."""
    work = 0.004 + 2e-5 * batch + 2e-8 * tokens if phase == "decode" else 0.002 + 1e-4 * tokens
    return work * (0.5 + 0.5 * 1400 / clock)


def scaling_power_w(phase: str, clock: int, batch: int, tokens: float) -> float:
    """Idle plus a part that grows faster than the clock."""
    relative = clock / 1400
    return 80.0 + (200.0 if phase == "decode" else 300.0) * relative * relative


def make_meta(clocks_mhz: tuple[int, ...], kv_capacity_tokens: int = 4096) -> ProfileMeta:
    """Metadata with every provenance stated as modelled."""
    return ProfileMeta(
        gpu=GpuMeta(name="synthetic", power_limit_w=400.0, memory_gib=80.0),
        model=ModelMeta(
            name="synthetic", tensor_parallel=1, kv_bytes_per_token=1024, max_context_tokens=4096
        ),
        engine=EngineMeta(
            name="none",
            version="0",
            max_prefill_tokens=1024,
            max_running_requests=64,
            kv_capacity_tokens=kv_capacity_tokens,
        ),
        clocks=ClocksMeta(
            supported_mhz=clocks_mhz,
            default_levels_mhz=tuple(sorted({clocks_mhz[0], clocks_mhz[-1]})),
        ),
        provenance={q: Provenance(status="modelled", source="closed form") for q in QUANTITIES},
    )


def write_synthetic_profile(
    directory: Path,
    *,
    time_s: Surface = scaling_time_s,
    power_w: Surface = scaling_power_w,
    idle_w: Callable[[int], float] = lambda clock: 50.0 + clock * 0.01,
    clocks_mhz: tuple[int, ...] = (700, 1000, 1400),
    batches: tuple[int, ...] = (1, 2, 4, 8, 9, 16, 32, 64),
    tokens: tuple[int, ...] = (1, 64, 1024, 4096),
    kv_capacity_tokens: int = 4096,
    spread_s: Surface | None = None,
) -> Profile:
    """Write and load a profile whose tables are the given functions on a rectangular grid."""
    tables = {
        phase: pd.DataFrame(
            [
                (f, b, t, 0, time_s(phase, f, b, t), power_w(phase, f, b, t))
                for f in clocks_mhz
                for b in batches
                for t in tokens
            ],
            columns=["frequency_mhz", "batch_size", "tokens", "trial", "time_s", "power_w"],
        )
        for phase in ("prefill", "decode")
    }
    if spread_s is not None:
        for phase, table in tables.items():
            points = zip(table["frequency_mhz"], table["batch_size"], table["tokens"], strict=True)
            table["spread_s"] = [spread_s(phase, *point) for point in points]
    idle = pd.DataFrame(
        [(f, 0, idle_w(f)) for f in (0, *clocks_mhz)], columns=["frequency_mhz", "trial", "power_w"]
    )
    meta = make_meta(clocks_mhz, kv_capacity_tokens)
    return write_profile(directory, meta, tables["prefill"], tables["decode"], idle)


ROUGH_CLOCKS = (700, 1000, 1200, 1400)
_BATCHES = {700: (1, 3, 4, 30), 1000: (1, 8, 30), 1200: (1, 2, 16, 30), 1400: (1, 30)}
_TOKENS = (1, 40, 300, 4096)


def rough_profile(directory: Path, seed: int) -> Profile:
    """Tables of random numbers on grids that differ from clock to clock: no law but > 0 holds."""
    rng = np.random.default_rng(seed)
    columns = ["frequency_mhz", "batch_size", "tokens", "trial", "time_s", "power_w"]
    tables = {}
    for phase in ("prefill", "decode"):
        rows = []
        for clock in (700, 1200, 1400):  # 1000 is interpolated between
            for batch in _BATCHES[clock]:
                inner = [] if rng.random() < 0.4 else [int(rng.integers(41, 299))]
                for tokens in sorted({*_TOKENS, *inner}):
                    work = rng.uniform(0.3, 3.0) if seed % 2 else 1.0 + tokens / 500
                    rows.append((clock, batch, tokens, 0, 0.003 * work, rng.uniform(60, 300)))
        tables[phase] = pd.DataFrame(rows, columns=columns)
    idle = pd.DataFrame(
        [(f, 0, rng.uniform(50, 120)) for f in (0, *ROUGH_CLOCKS)],
        columns=["frequency_mhz", "trial", "power_w"],
    )
    return write_profile(
        directory, make_meta(ROUGH_CLOCKS), tables["prefill"], tables["decode"], idle
    )
