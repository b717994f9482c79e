"""A machine of emulated cards: their file, the engine's plans, the actuator that sets clocks."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from voltana.hwreplay.emulated.build import build_library, show_here
from voltana.hwreplay.emulated.plan import Plan
from voltana.hwreplay.emulated.state import Behaviour, create_cards
from voltana.hwreplay.engines.plan import ServerPlan
from voltana.profiles.catalog import load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import Phase

HELPER_S: Final = 20.0
POLL_S: Final = 0.02


Own = Mapping[Phase, Sequence[str]]
"""By phase the profile of each instance, as `SimConfig.mixed_profiles` has them."""


def emulated_gpus(
    profile: str, counts: Mapping[Phase, int], own: Own = MappingProxyType({})
) -> dict[Phase, tuple[tuple[int, ...], ...]]:
    """The emulated cards of each instance: in a row, kind by kind, as many as its profile's.

    Args:
        profile: Whose tensor parallelism says how many cards an instance has.
        counts: Instances of each kind.
        own: The same of phases whose instances have their own.

    Raises:
        VoltanaError: No such profile.
    """
    free = itertools.count()
    return {
        phase: tuple(
            tuple(itertools.islice(free, load_profile(name).meta.model.tensor_parallel))
            for name in own.get(phase, [profile] * count)
        )
        for phase, count in counts.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Cards for so many instances, each as wide as its profile says."""

    profile: str
    counts: Mapping[Phase, int]
    directory: Path
    """Takes the cards' file and the engine's passes; its path short, for sockets."""
    library: Path
    """Folder of the compiled library."""
    max_requests: int = 1024
    """Largest batch."""
    seed: int = 13
    noise_scale: float = 0.0
    overlap_frac: float | None = None
    """As `mixed_overlap_frac` of a simulation."""
    own: Own = field(default_factory=dict)
    """Profiles of unlike instances."""

    def profile_of(self, phase: Phase, instance_id: int) -> str:
        """Whose cards an instance has."""
        own = self.own.get(phase)
        return self.profile if own is None else own[instance_id]

    @property
    def profiles(self) -> list[str]:
        """Of each card."""
        return [
            self.profile_of(phase, i)
            for phase, instances in self.gpus().items()
            for i, cards in enumerate(instances)
            for _ in cards
        ]

    @property
    def state(self) -> Path:
        """The mapped file of the cards."""
        return self.directory / "cards"

    @property
    def num_cards(self) -> int:
        return sum(len(cards) for each in self.gpus().values() for cards in each)

    def gpus(self) -> dict[Phase, tuple[tuple[int, ...], ...]]:
        """Cards of each instance, as `[replay] gpus` has them."""
        return emulated_gpus(self.profile, self.counts, self.own)

    def passes_of(self, phase: Phase, instance_id: int) -> Path:
        """Where an instance's passes are written down."""
        return self.directory / f"{phase}-{instance_id}.passes"

    def environment_of(self, at: ServerPlan) -> Mapping[str, str]:
        """What a server that is started here has in its environment."""
        plan = Plan(
            profile=self.profile_of(at.phase, at.instance_id),
            phase=at.phase,
            instance_id=at.instance_id,
            cards=self.gpus()[at.phase][at.instance_id],
            state=str(self.state),
            passes=str(self.passes_of(at.phase, at.instance_id)),
            max_requests=self.max_requests,
            seed=self.seed,
            noise_scale=self.noise_scale,
            overlap_frac=self.overlap_frac,
        )
        return plan.environment() | {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


@contextmanager
def run_machine(machine: Machine, behaviour: Behaviour | None = None) -> Iterator[Path]:
    """Make the cards, show them to this process and those it starts, and run the actuator.

    Yields:
        The actuator's socket.

    Raises:
        VoltanaError: The library does not compile, or the actuator does not come up.
    """
    build_library(machine.library)
    create_cards(machine.state, machine.profiles, machine.num_cards, machine.library, behaviour)
    show_here(machine.library, machine.state)
    socket, log = machine.directory / "actuator.sock", machine.directory / "actuator.log"
    gpus = [word for index in range(machine.num_cards) for word in ("--gpu", str(index))]
    command = [sys.executable, "-m", "voltana.hwreplay.actuator", str(socket), *gpus]
    command += ["--allow-writable-code", "--max-rate", "5000"]
    with log.open("wb") as out:
        actuator = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        _await(actuator, socket, log)
        yield socket
    finally:
        actuator.terminate()
        actuator.wait()


def _await(actuator: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    deadline_s = time.monotonic() + HELPER_S
    while not socket.exists():
        if actuator.poll() is not None or time.monotonic() > deadline_s:
            said = log.read_text(errors="replace").strip().splitlines()
            raise VoltanaError(said[-1] if said else f"the actuator did not start: see {log}")
        time.sleep(POLL_S)
