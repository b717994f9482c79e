"""What a controller can see of an instance without voltana's router: its engine's records alone.

A record tells the batch, its tokens, how long it took, and the engine's own queue. When a request
arrived, what it has waited and how long it will be, only the router knows that sent it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

from voltana.hwreplay.view.context import PolicySource
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.base import COLOCATED, PREFILL, Controller, IdlePlan, InstanceState, Phase

UNTOLD: Final = frozenset(("open_requests", "list_waiting", "list_running"))
"""Fields of `InstanceState` that no engine's record tells."""
UNSEEN: Final = UNTOLD | {"last_queue_delay_s", "ended_queue_delay_s"}
"""The same with those for which `ColocatedTracker` alone has an upper bound."""
STEPS: Final = 40
STEP_S: Final = 0.25
"""A rehearsal of ten seconds: controllers that look back do so within a few."""


class UnseenError(VoltanaError):
    """A controller has looked at what cannot be seen."""


class _View:
    """An instance's state; fields that nobody fills raise."""

    __slots__ = ("_state", "_unseen", "_where")

    def __init__(self, state: InstanceState, where: str) -> None:
        self._state = state
        self._unseen = UNTOLD if state.phase == COLOCATED else UNSEEN
        self._where = where

    def __getattr__(self, name: str) -> object:
        if name in self._unseen:
            raise UnseenError(
                f"{self._where} looks at {name}, which no engine's record tells: name another "
                "controller in [simulate], or send requests through voltana's router (voltana "
                "serve)"
            )
        return getattr(self._state, name)


class EngineOnly(Controller):
    """A controller that sees what the engine tells."""

    def __init__(self, controller: Controller, where: str) -> None:
        """Stand before a controller.

        Args:
            controller: Decides.
            where: Its name and instance, for errors.
        """
        self._controller = controller
        self._where = where

    def decide(self, state: InstanceState) -> int:
        return self._controller.decide(self._view(state))

    def initial_clock_mhz(self) -> int:
        return self._controller.initial_clock_mhz()

    def on_idle(self, state: InstanceState) -> IdlePlan | None:
        return self._controller.on_idle(self._view(state))

    def learnt(self) -> Mapping[str, float]:
        return self._controller.learnt()

    def _view(self, state: InstanceState) -> InstanceState:
        return cast("InstanceState", _View(state, self._where))


def engine_only(source: PolicySource, phase: Phase, instance_id: int) -> Controller:
    """An instance's controller where no router speaks.

    Args:
        source: Makes it.
        phase: Of the instance.
        instance_id: Of the instance.

    Raises:
        VoltanaError: In a rehearsal another one of its kind looked at what cannot be seen.
    """
    config = source.config
    spec = config.prefill_controller_spec if phase == PREFILL else config.decode_controller_spec
    where = f"{phase} controller {spec.partition(':')[0]}"
    spare = PolicySource(config=config, profile=source.profile)  # it may keep what it has seen
    _rehearse(EngineOnly(spare.make_controller(phase, instance_id), where), phase)
    return EngineOnly(source.make_controller(phase, instance_id), where)


def _rehearse(controller: Controller, phase: Phase) -> None:
    """Show a controller some seconds of load with and without a queue."""
    state = InstanceState(instance_id=0, phase=phase, kv_capacity_tokens=100_000)
    for step in range(STEPS):
        state.now_s = step * STEP_S
        waiting = 3 * (step // 4 % 2)
        batch = 1 + step % 8
        state.is_busy = True
        state.num_waiting, state.waiting_tokens = waiting, 500 * waiting
        state.last_batch_size = state.ended_batch_size = state.num_running = batch
        state.last_tokens = state.ended_tokens = state.kv_tokens = 500 * batch
        state.last_duration_s = 0.02
        if phase == COLOCATED:
            state.chunk_requests, state.chunk_tokens = waiting, 500 * waiting
        try:
            controller.decide(state)
        except UnseenError:
            raise
        except Exception:  # noqa: BLE001 (what else it needs, the run itself will tell)
            return
