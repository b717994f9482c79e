"""A fleet that scales: a scaler is asked every period, members move, routers see who serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.states import PowerStates, StateMeta
from voltana.sim.config import SimConfig
from voltana.sim.engine.agenda import Agenda
from voltana.sim.engine.decode import DecodeInstance
from voltana.sim.engine.fleet import Fleet
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.scaling.budget import Card, PowerBudget, capped
from voltana.sim.engine.scaling.member import Member, Role
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import (
    AWAKE,
    COLOCATED,
    DECODE,
    PREFILL,
    Controller,
    Phase,
)
from voltana.sim.policies.registry import make_scaler
from voltana.sim.policies.scalers.answers import ask
from voltana.sim.policies.scalers.base import Demand, FleetView, Kind, Plan, ScalerContext
from voltana.sim.workload.workload import Workload


class ScaledFleet(Fleet):
    """A `Fleet` with a scaler.

    An instance leaves service only while as many as are wanted stay in it: whoever replaces it
    wakes first; of unlike instances all that are wanted. Nobody is asked anew when a base clock
    changes: decode's runs end with the iteration that is running, and the next decision sees it.
    """

    def __init__(
        self,
        config: SimConfig,
        profile: Profile,
        requests: Iterable[Workload],
        log: RunLog,
        *,
        agenda: Agenda | None = None,
        others: Mapping[str, Profile] | None = None,
    ) -> None:
        """As a `Fleet`.

        Args:
            config: What to run.
            profile: The truth about times and power, and about states out of service.
            requests: Parts of the workload, in order of arrival.
            log: Takes what becomes of requests.
            agenda: Keeps the time; a heap unless told.
            others: Profiles of a mixed fleet, by the names that the configuration has for them.
        """
        self._budget: PowerBudget | None = None
        self._ceilings_mhz: Mapping[Card, int] = {}
        super().__init__(config, profile, requests, log, agenda=agenda, others=others)
        states = [self._states_of(i.state.phase, i.state.instance_id) for i in self.instances]
        context = ScalerContext(
            policy=self._context(COLOCATED if self._is_colocated else DECODE, 0, "router"),
            states=states[-1],
            kinds={phase: self._kinds(phase) for phase in config.mixed_profiles},
            budget_w=config.budget_w,
        )
        self._has_kinds = bool(context.kinds)
        self._scaler = make_scaler(config.scaler or "all-awake", context)
        if context.kinds and not self._scaler.knows_kinds:
            raise VoltanaError(
                f"scaler {config.scaler} plans with one kind of instances, got "
                f"{' and '.join(f'{phase}_profiles' for phase in context.kinds)}: take dualscale"
            )
        self._members = [
            Member(instance, of_one, self.agenda.call_at, self._changed)
            for instance, of_one in zip(self.instances, states, strict=True)
        ]
        self._pair_roles(self._scaler.num_switching, profile)
        self._of_prefill = self._members[: len(self.prefill)]
        self._of_decode = self._members[len(self.prefill) :]
        self._pools = [(self._of_decode, self._routed_decode)]
        if not self._is_colocated:
            self._pools.insert(0, (self._of_prefill, self._routed_prefill))
        self._cards = [self._card(i.state.phase, i.state.instance_id) for i in self.instances]
        if self._ceilings_mhz:
            for instance, card in zip(self.instances, self._cards, strict=True):
                instance.state.ceiling_mhz = self._ceilings_mhz[card]
        self._clocks_mhz = sorted(
            {
                f
                for i in self.instances
                for f in self._machine(i.state.phase, i.state.instance_id).models.clocks_mhz
            }
        )
        self._begin_window(0.0)

    def _states_of(self, phase: Phase, index: int) -> PowerStates:
        profile = self._machine(phase, index).profile
        if profile.states is None:
            raise VoltanaError(
                f"profile {profile.name!r} does not say what an instance out of service draws, "
                "which a fleet that scales needs: write its states.toml (docs/profiles.md)"
            )
        return profile.states

    def _kinds(self, phase: Phase) -> list[Kind]:
        """The instances of a phase by their machine, in the order of the first of each."""
        members: dict[int, list[int]] = {}
        for index in range(len(self.prefill if phase == PREFILL else self.decode)):
            members.setdefault(id(self._machine(phase, index)), []).append(index)
        return [
            Kind(
                instances=tuple(of_one),
                policy=self._context(phase, of_one[0], "router"),
                states=self._states_of(phase, of_one[0]),
            )
            for of_one in members.values()
        ]

    def start(self) -> Iterator[SimRequest]:
        arrivals = super().start()
        self.agenda.call_at(self._scaler.period_s, self._scale)
        lent = [m for m in self._of_prefill if isinstance(m, Role)]
        for role in lent:
            role.lend(0.0)
        if lent:
            self._changed(0.0)
        return arrivals

    def _pair_roles(self, count: int, profile: Profile) -> None:
        """Make roles of the last so many instances of each phase."""
        if count == 0:
            return
        prefill, decode = self._config.num_prefill, self._config.num_decode
        if count >= min(prefill, decode) or self._config.host_power_w is not None:
            raise VoltanaError(
                "cards that switch must be fewer than the instances of either phase, and hosts not "
                f"counted, got {count} of {prefill}P{decode}D and "
                f"host_power_w={self._config.host_power_w}: add instances or leave it out"
            )
        lent = StateMeta(
            power_w=0.0, enter_s=0.0, wake_s=self._scaler.switch_s,
            change_w=profile.truth(extrapolate=True).idle_power_w(profile.clocks_mhz[-1]),
            status="modelled", source="a card that changes its role idles at the top clock",
        )  # fmt: skip
        assert profile.states is not None
        for at in range(prefill - count, prefill):
            pair = [
                Role(self.instances[i], profile.states, self.agenda.call_at, self._changed, lent)
                for i in (at, at + decode)
            ]
            pair[0].other, pair[1].other = pair[1], pair[0]
            self._members[at], self._members[at + decode] = pair

    def _answers(self, controller: Controller, phase: Phase, index: int) -> ControllerAnswers:
        budget_w = self._config.budget_w
        if budget_w is not None:
            if self._budget is None:  # the machines are known by now
                cards = [self._card(p, i) for p, n in self._config.counts.items() for i in range(n)]
                self._budget = PowerBudget(budget_w, cards)
                self._ceilings_mhz = self._budget.ceilings_mhz(cards, 0.0)
            controller = capped(controller, self._ceilings_mhz[self._card(phase, index)])
        return super()._answers(controller, phase, index)

    def _card(self, phase: Phase, index: int) -> Card:
        return Card(phase, self._machine(phase, index))

    def accept(self, request: SimRequest) -> None:
        self._num_requests += 1
        self._num_tokens += request.input_tokens
        self._num_squares += request.input_tokens * request.input_tokens
        super().accept(request)

    def hand_over(self, request: SimRequest, now_s: float) -> None:
        self._of_prefill[request.prefill_id].num_sending += 1
        super().hand_over(request, now_s)

    def _deliver(self, request: SimRequest, now_s: float) -> None:
        super()._deliver(request, now_s)
        member = self._of_prefill[request.prefill_id]
        member.num_sending -= 1
        member.rest(now_s)
        self._of_decode[request.decode_id].rest(now_s)  # it may have been over without decode

    def _finished(self) -> tuple[int, int]:
        states = self._decode_states
        return sum(s.finished_requests for s in states), sum(s.finished_tokens for s in states)

    def _begin_window(self, now_s: float) -> None:
        self._window_from_s = now_s
        self._num_requests = self._num_tokens = self._num_squares = 0
        self._finished_before = self._finished()

    def _scale(self, now_s: float) -> None:
        """Ask the scaler and begin what it wants."""
        for instance in self.instances:
            instance.look(now_s)
        requests, tokens = self._finished()
        demand = Demand(
            window_s=now_s - self._window_from_s,
            requests=self._num_requests,
            input_tokens=self._num_tokens,
            squared_input_tokens=self._num_squares,
            finished_requests=requests - self._finished_before[0],
            finished_tokens=tokens - self._finished_before[1],
        )
        view = FleetView(
            now_s=now_s, prefill=self._prefill_states, decode=self._decode_states, demand=demand
        )
        plan = ask(self._scaler, view, self._clocks_mhz)
        self._begin_window(now_s)
        for members, wanted in ((self._of_prefill, plan.prefill), (self._of_decode, plan.decode)):
            for member, state in zip(members, wanted, strict=True):
                member.wanted = state
        self._set_base_clocks(plan, now_s)
        self._changed(now_s)
        self.agenda.call_at(now_s + self._scaler.period_s, self._scale)

    def _set_base_clocks(self, plan: Plan, now_s: float) -> None:
        for index, instance in enumerate(self.prefill):
            instance.state.base_mhz = self._own_clock_mhz(PREFILL, index, plan.prefill_mhz)
        for index, decode in enumerate(self.decode):
            base_mhz = self._own_clock_mhz(DECODE, index, plan.decode_mhz)
            if decode.state.base_mhz != base_mhz:
                decode.state.base_mhz = base_mhz
                _end_run(decode, now_s)

    def _own_clock_mhz(self, phase: Phase, index: int, base_mhz: int) -> int:
        """The base clock, if the card has it; 0 if not."""
        return base_mhz if base_mhz in self._machine(phase, index).models.clocks_mhz else 0

    def _changed(self, now_s: float) -> None:
        """Somebody's state or wish has changed: route accordingly, and let others follow."""
        for members, routed in self._pools:
            routed[:] = [m.state for m in members if m.state.power_state == AWAKE]
            num_wanted = sum(m.wanted == AWAKE for m in members)
            for member in members:
                may_leave = len(routed) > num_wanted
                if self._has_kinds:  # of unlike ones so many are not as good as as many others
                    may_leave = all(_is_awake(m) for m in members if m.wanted == AWAKE)
                member.move(now_s, may_leave=may_leave)
        if self._budget is not None:
            self._limit_clocks(self._budget, now_s)

    def _limit_clocks(self, budget: PowerBudget, now_s: float) -> None:
        """Bring the ceilings to what the fleet is now."""
        both = list(zip(self._members, self._cards, strict=True))
        in_service = [card for member, card in both if member.draws_fully]
        away_w = sum(m.instance.track.power_w for m in self._members if not m.draws_fully)
        ceilings_mhz = budget.ceilings_mhz(in_service, away_w)
        if ceilings_mhz is self._ceilings_mhz:
            return
        self._ceilings_mhz = ceilings_mhz
        for instance, card in zip(self.instances, self._cards, strict=True):
            ceiling_mhz = instance.state.ceiling_mhz = ceilings_mhz[card]
            if instance.track.target_mhz > ceiling_mhz:
                instance.track.request_clock(now_s, ceiling_mhz)
        for decode in self.decode:
            _end_run(decode, now_s)


def _is_awake(member: Member) -> bool:
    return member.state.power_state == AWAKE


def _end_run(decode: DecodeInstance, now_s: float) -> None:
    """Let the iteration that is running be the last of its run: the controller is asked then."""
    if decode.state.is_busy and decode.run.count > 1:
        decode.cut(now_s)
