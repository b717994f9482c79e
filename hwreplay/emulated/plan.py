"""What an engine's plug-in is told about the card that it stands on, and what it writes down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import voltana
from voltana.hwreplay.emulated.card import Cards
from voltana.hwreplay.emulated.silicon import Noise, Pass, Silicon
from voltana.profiles.catalog import load_profile

ENVIRONMENT: Final = "VOLTANA_EMULATE"
"""Names the plan to the engine; set it before the server starts."""
ANSWER_ID: Final = 3
"""The token that the plug-in always answers (its `TOKEN`)."""
PASS: Final = np.dtype(
    [
        ("begin_s", "f8"), ("due_s", "f8"), ("end_s", "f8"),
        ("clock_mhz", "f8"), ("batch_size", "f8"), ("tokens", "f8"),
        ("chunk_batch", "f8"), ("chunk_tokens", "f8"),
    ]
)  # fmt: skip
"""One row of a file of passes: native doubles, times on CLOCK_MONOTONIC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The emulated card of one server."""

    profile: str
    """Name or folder."""
    phase: str
    """Of the server, which says whose noise it has."""
    instance_id: int
    cards: tuple[int, ...]
    """Records of its cards, one a rank."""
    state: str
    """The mapped file of the cards."""
    passes: str
    """Where its passes are written down."""
    max_requests: int
    """Largest batch."""
    seed: int = 13
    noise_scale: float = 0.0
    """Multiplies the profile's spread of iteration times."""
    overlap_frac: float | None = None
    """Of a chunk and a step in one pass, as `mixed_overlap_frac` of a simulation."""

    def environment(self) -> dict[str, str]:
        """What the server's environment has beyond ours."""
        code = Path(voltana.__file__).parent.parent
        return {ENVIRONMENT: json.dumps(asdict(self) | {"code": str(code)})}


def open_silicon(plan: Mapping[str, Any], rank: int) -> Silicon:
    """The cards of one instance in one rank's process, from the plan in its environment."""
    profile = load_profile(plan["profile"])
    noise = Noise(
        profile, plan["phase"], plan["instance_id"], seed=plan["seed"], scale=plan["noise_scale"]
    )
    cards = Cards(plan["state"])
    mine = [cards[index] for index in plan["cards"]]
    mine[rank].add_process()
    step = profile.mixed_step(extrapolate=True, overlap_frac=plan["overlap_frac"])
    is_both = plan["phase"] == "colocated"
    return Silicon(step, mine, rank=rank, noise=noise, is_colocated=is_both)


class Passes:
    """Appends passes to a file, each whole."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def keep(self, one: Pass) -> None:
        """Write one down."""
        row = (one.begin_s, one.due_s, one.end_s, one.clock_mhz, *one.work.decode, *one.work.chunk)
        os.write(self._file, np.array(row, dtype=np.float64).tobytes())


def read_passes(path: Path) -> npt.NDArray[np.void]:
    """All whole rows of a file, of dtype `PASS`."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) - len(data) % PASS.itemsize], dtype=PASS)
