"""A profile from kernel tables, a power model and a clock shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from voltana.profiles.catalog import Profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.importing.cost import Cost, Work
from voltana.profiles.importing.decoder import Decoder
from voltana.profiles.importing.power import ClockShape, PowerModel
from voltana.profiles.importing.provenance import provenance, stated_errors
from voltana.profiles.importing.systems import System
from voltana.profiles.importing.tables import KernelTables
from voltana.profiles.schema import (
    ClocksMeta,
    EngineMeta,
    GpuMeta,
    ModelMeta,
    ProfileMeta,
    SpreadMeta,
)
from voltana.profiles.tables import PHASE_COLUMNS

RELATIVE_CLOCKS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Clocks of the tables, relative to the top one; between them time is linear in 1/f."""
MAX_PREFILL_TOKENS: Final = 16_384
MAX_RUNNING: Final = 512
BATCHES: Final = (
    1, 2, 4, 8, *range(16, 129, 16), 129, 144, 160, 192, 224, 256, 257, 288, 320, 384, 448, 512,
)  # fmt: skip
"""Decode batches: the steps of the matrix products at 129 and 257 are kept."""
CONTEXTS: Final = (128, 512, 1024, 2048, 8192)
"""Tokens a request at which decode attention bends."""
PREFILL_BATCHES: Final = (1, 2, 4, 8, 16, 32, 128)
PREFILL_TOKENS: Final = (
    1, 16, 64, 65, 128, 129, 256, 257, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
    10240, 12288, 14336, 16384,
)  # fmt: skip
PREFILL_HOST_S: Final = 0.005
"""Scheduling between prefill batches, as of the A100 profiles. Modelled."""
USED_MEMORY: Final = 0.9
"""Share of the card's memory that an engine takes."""
OTHER_BYTES: Final = 3_758_096_384
"""Activations, graphs and buffers: the data base's own figure."""
SPREAD: Final = SpreadMeta(prefill=0.02, decode=0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a profile is made from."""

    tables: KernelTables
    decoder: Decoder
    power: PowerModel | None
    clocks: ClockShape | None

    def __post_init__(self) -> None:
        if self.clocks is not None and self.power is None:
            raise VoltanaError(
                "--clock-shape must come with --power-from: clocks differ by the power they save"
            )

    @property
    def system(self) -> System:
        """The card."""
        return self.tables.system


class Builder:
    """Tables of one profile."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._cost = Cost(source.tables, source.decoder)
        self.capacity_tokens = kv_capacity_tokens(source.system, source.decoder)
        self.clocks_mhz = grid_clocks(source)

    def decode(self) -> pd.DataFrame:
        """Rows of decode.csv."""
        points = [(b, t) for b in self.batches() for t in self._decode_tokens(b)]
        return self._frame("decode", points)

    def prefill(self) -> pd.DataFrame:
        """Rows of prefill.csv."""
        return self._frame("prefill", [(b, t) for b in PREFILL_BATCHES for t in PREFILL_TOKENS])

    def idle(self) -> pd.DataFrame:
        """Rows of idle.csv; an unlocked card that holds a context stays at its top clock."""
        gpus = self._source.decoder.tensor_parallel
        rows = [(f, 0, gpus * self._idle_w(f)) for f in (0, *self.clocks_mhz)]
        return pd.DataFrame(rows, columns=["frequency_mhz", "trial", "power_w"])

    def batches(self) -> list[int]:
        """Decode batches whose requests have 16 tokens each in the cache."""
        return [b for b in BATCHES if 16 * b <= self.capacity_tokens]

    def rows_at(
        self, phase: str, batch: int, tokens: float, clocks_mhz: Sequence[int]
    ) -> list[tuple[float, ...]]:
        """Rows of one point at some clocks, from the model itself.

        Args:
            phase: "prefill" or "decode".
            batch: Requests.
            tokens: New tokens (prefill) or context tokens (decode) of the batch.
            clocks_mhz: A row each.
        """
        work = getattr(self._cost, phase)(batch, tokens)
        host_s = PREFILL_HOST_S if phase == "prefill" else 0.0
        return [
            (f, batch, tokens, 0, *self._at_clock(phase, batch, tokens, work, host_s, f))
            for f in clocks_mhz
        ]

    def _at_clock(
        self, phase: str, batch: int, tokens: float, work: Work, host_s: float, clock_mhz: int
    ) -> tuple[float, float]:
        """Time in s and power in W of the instance.

        The kernels were timed with the clock unlocked: a card that its power limit held back then
        is at the clock of that limit, and a lock above it changes nothing.
        """
        gpus = self._source.decoder.tensor_parallel
        limit_w = self._source.system.power_limit_w
        power, shape = self._source.power, self._source.clocks
        if power is None:
            return work.time_s + host_s, gpus * limit_w
        loaded_w = power.loaded_w(work, limit_w)
        time_s, busy_w = work.time_s, min(loaded_w, limit_w)
        if shape is not None:
            active_w = loaded_w - power.idle_at_w(1.0)
            held = _held_back(power, shape, active_w, limit_w)
            real = min(clock_mhz / self._source.system.top_mhz, held)
            share = shape.share(phase, batch, tokens)
            time_s *= shape.time_factor(share, real) / shape.time_factor(share, held)
            busy_w = min(power.idle_at_w(real) + active_w * shape.phi_at(real), limit_w)
        mean_w = (busy_w * time_s + self._idle_w(clock_mhz) * host_s) / (time_s + host_s)
        return time_s + host_s, gpus * mean_w

    def _idle_w(self, clock_mhz: int) -> float:
        """Of one GPU; without a power model the limit, as everywhere."""
        if self._source.power is None:
            return self._source.system.power_limit_w
        top_mhz = self._source.system.top_mhz
        return self._source.power.idle_at_w((clock_mhz or top_mhz) / top_mhz)

    def _decode_tokens(self, batch: int) -> list[int]:
        inner = [batch * c for c in CONTEXTS if 1 < batch * c < self.capacity_tokens]
        return [1, *inner, self.capacity_tokens]

    def _frame(self, phase: str, points: list[tuple[int, int]]) -> pd.DataFrame:
        rows = [r for b, t in points for r in self.rows_at(phase, b, t, self.clocks_mhz)]
        frame = pd.DataFrame(rows, columns=list(PHASE_COLUMNS))
        frame = frame.sort_values(list(PHASE_COLUMNS[:3]), ignore_index=True)
        # the tables scatter: more tokens never take less time
        point = [frame["frequency_mhz"], frame["batch_size"]]
        frame["time_s"] = frame["time_s"].groupby(point).cummax()
        rounded = {c: frame[c].map(lambda v: float(f"{v:.5g}")) for c in ("time_s", "power_w")}
        return frame.astype(dict.fromkeys(PHASE_COLUMNS[:4], "int64")).assign(**rounded)


def build_profile(source: Source, directory: Path) -> Profile:
    """Write the profile of a source and load it.

    Raises:
        VoltanaError: The model does not fit the card, or the tables lack a kernel of it.
    """
    builder = Builder(source)
    prefill, decode = builder.prefill(), builder.decode()
    return write_profile(directory, _meta(source, builder), prefill, decode, builder.idle())


def kv_capacity_tokens(system: System, decoder: Decoder) -> int:
    """Tokens whose keys and values fit beside the weights, on all GPUs together.

    Raises:
        VoltanaError: Not even one prompt of 1,024 tokens fits.
    """
    free = USED_MEMORY * system.memory_bytes - decoder.weight_bytes - OTHER_BYTES
    tokens = int(free * decoder.tensor_parallel / decoder.kv_bytes_per_token)
    if tokens < 1024:
        raise VoltanaError(
            f"{decoder.name} must fit the memory: {decoder.weight_bytes / 1e9:.1f} GB of weights "
            f"on each {system.name} leave {max(free, 0) / 1e9:.1f} GB of "
            f"{system.memory_bytes / 1e9:.1f}: raise --tp"
        )
    return tokens


def grid_clocks(source: Source) -> tuple[int, ...]:
    """Clocks of the tables: the top one alone, or from the lowest that the shape knows."""
    top, step = source.system.top_mhz, source.system.step_mhz
    if source.clocks is None:
        return (top,)
    wanted = [r for r in RELATIVE_CLOCKS if r > source.clocks.lowest - 0.01]
    return tuple(sorted({top - step * int(top * (1 - r) / step) for r in wanted}))


def _held_back(power: PowerModel, shape: ClockShape, active_w: float, limit_w: float) -> float:
    """The highest relative clock that keeps the power limit."""
    grid = np.linspace(shape.lowest, 1.0, 201)
    fits = [r for r in grid if power.idle_at_w(r) + active_w * shape.phi_at(r) <= limit_w]
    return float(max(fits, default=shape.lowest))


def _meta(source: Source, builder: Builder) -> ProfileMeta:
    system, model, tables = source.system, source.decoder, source.tables
    clocks = builder.clocks_mhz
    supported = tuple(range(clocks[0], clocks[-1] + 1, system.step_mhz))
    return ProfileMeta(
        gpu=GpuMeta(
            name=system.name,
            power_limit_w=system.power_limit_w,
            memory_gib=round(system.memory_bytes / 2**30, 1),
        ),
        model=ModelMeta(
            name=model.name,
            tensor_parallel=model.tensor_parallel,
            kv_bytes_per_token=model.kv_bytes_per_token,
            max_context_tokens=model.max_context_tokens,
        ),
        engine=EngineMeta(
            name=tables.engine,
            version=tables.version,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            max_running_requests=builder.batches()[-1],
            kv_capacity_tokens=builder.capacity_tokens,
        ),
        clocks=ClocksMeta(
            supported_mhz=supported,
            default_levels_mhz=tuple(sorted({clocks[len(clocks) // 2], clocks[-1]})),
        ),
        errors=stated_errors(tables, model, source.power, source.clocks),
        spread=SPREAD,
        provenance=provenance(tables, model, source.power, source.clocks),
    )
