"""Decode instance: continuous batching under a KV-cache capacity.

It plays runs of iterations (`voltana.sim.engine.physics.run`). A run ends where the next request
finishes, where the controller might decide anew (it says so: `steady_iterations`), where the
table's linear piece, the KV cache or the block of noise ends, or where a sag begins or ends.
A request that arrives inside a run cuts it at the end of the iteration then running. With
`max_iterations` = 1 every iteration is a run of its own: the reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Final

from voltana.sim.config import SimConfig
from voltana.sim.engine.instance import Instance
from voltana.sim.engine.logs.exact import RunLog
from voltana.sim.engine.physics.track import GpuTrack
from voltana.sim.engine.request import SimRequest
from voltana.sim.policies.answers import ControllerAnswers
from voltana.sim.policies.base import Controller, InstanceState, RunningRequest, WaitingRequest

Start = Callable[[float], None]
_MANY: Final = 1 << 60


class DecodeInstance(Instance):
    """Every iteration adds one token to every running request.

    Work per run is independent of the batch size: requests are filed under the iteration they
    finish in, the batch's context is one sum, and one run of gaps stands for those of all.

    Admission and retraction are those of SGLang 0.5.23's decode server. A joiner needs room for its
    context and for `kv_reserve_tokens` of every request that then runs, itself among them. When
    the next iteration would overflow the cache, requests are retracted, the fewest output tokens
    first, of these the longest prompt, of these the latest joiner. They keep their tokens (the
    cache is backed up), and resume in the order in which they went, before any new one joins.
    """

    def __init__(
        self,
        config: SimConfig,
        log: RunLog,
        state: InstanceState,
        answers: ControllerAnswers,
        track: GpuTrack,
        *,
        max_running: int,
    ) -> None:
        """See the class.

        Args:
            config: The run's configuration.
            log: Takes what becomes of requests.
            state: What policies see of this instance; it is kept here.
            answers: The controller, its answers checked.
            track: The GPUs.
            max_running: Requests that the engine runs at once.
        """
        super().__init__(config, log, state, answers, track)
        self.step_rank = 1
        has_steady = type(answers.controller).steady_iterations is not Controller.steady_iterations
        self.max_iterations = _MANY if has_steady else 1
        """Of a run, whatever the controller promises."""
        self.waiting: deque[SimRequest] = deque()
        self._retracted: deque[SimRequest] = deque()
        """They come before those that wait; `state.num_waiting` counts both."""
        self._iteration = 0
        """Number of the run's first iteration; without a run, of the one that has ended last."""
        self._shown = 0
        """How many iterations of the run the state shows as ended."""
        self._reported = 0
        """How many of them the log has heard of."""
        self._finishing: dict[int, list[SimRequest]] = {}
        """Running requests by the number of their last iteration."""
        self._finish_order: list[int] = []
        """Heap of the keys of `_finishing`, with some that are gone."""
        self._join_order: list[SimRequest] = []
        """Running requests, latest joiner last; those that have finished are skipped lazily."""
        self._joiners: list[SimRequest] = []
        """Joined with the run and still waiting for a token from its first iteration."""
        self._num_joiners = 0
        """How many of them there were when the run began."""
        self._visitors: list[Callable[[float], None]] = []
        """Called with the time at the end of the running iteration."""
        self._max_running = max_running
        self._has_admission = answers.has_admission
        self._most = max_running
        """Requests that may run at once, as of the last boundary at which somebody waited. No fewer
        than run since: who joins has waited."""
        # at least what the next iteration writes
        self._reserve_tokens = max(config.kv_reserve_tokens, 1)
        # where prefill is here too: prompts under way; memory beside running requests' contexts;
        # requests that want memory before they are prefilled
        self._num_begun = self._held_tokens = self._num_asking = 0
        self._freed_tokens = config.kv_retract_tokens
        self._first_token_here = config.first_token == "decode"
        self._length_oracle = config.length_oracle
        self._sees_next_batch = config.decode_metrics == "before"
        self._has_record = False
        state.list_waiting = self._list_waiting
        state.list_running = self._list_running

    def submit(self, request: SimRequest, now_s: float) -> None:
        """A request's KV cache has arrived."""
        self.waiting.append(request)
        self.state.num_waiting += 1
        self.state.waiting_tokens += request.input_tokens + request.generated_tokens
        if self._is_parked:
            self._wake(now_s)
        elif self.run.count > 1 and self.state.is_busy:
            self.cut(now_s)

    def look(self, now_s: float) -> None:
        if not self.state.is_busy:
            self._settle_idle(now_s)
        elif self.run.count > 1:
            ended = self.run.ended_before(now_s)
            if ended != self._shown:
                self._show(ended)
                self.state.energy_j = self.track.energy_j + self.run.energy_j(ended)
                self.track.power_w = self.run.power_w(ended)

    def report(self, now_s: float) -> None:
        self.look(now_s)
        if self.state.is_busy:
            self._report_gaps(self._shown)

    def at_boundary(self, action: Callable[[float], None], now_s: float) -> None:
        """Call `action` with the time when the running iteration ends; at once if none runs."""
        if self._is_parked:
            action(now_s)
        else:
            self._visitors.append(action)
            if self.run.count > 1 and self.state.is_busy:
                self.cut(now_s)

    def before_prefill(self, request: SimRequest, start: Start) -> Start:
        """What is called when a request comes that prefill may `start` at a boundary."""
        return partial(self.at_boundary, start)

    def leave_out(self, request: SimRequest, now_s: float) -> None:
        """Its KV cache has come, and prefill has made the only token that was wanted."""

    def park(self, now_s: float) -> None:
        super().park(now_s)
        if self._visitors:
            self._let_in(now_s)

    def _let_in(self, now_s: float) -> None:
        visitors, self._visitors = self._visitors, []
        for action in visitors:
            action(now_s)

    def _forget_last_iteration(self) -> None:
        self._has_record = False

    def _begin(self, now_s: float) -> None:
        self._form_batch(now_s)
        state, track, run = self.state, self.track, self.run
        batch_size = self._batch_size = state.num_running
        tokens = self._batch_tokens = state.kv_tokens
        self._num_joiners = len(self._joiners)
        self._shown = self._reported = 0
        track.begin(now_s, batch_size, tokens)
        if (
            self.max_iterations > 1
            and run.line_end_tokens > tokens
            and self._decision_mhz == track.target_mhz
            and state.clock_mhz == track.clock_mhz  # a change shows when an iteration has ended
        ):
            further = self._further_iterations(batch_size, tokens)
            if further > 0:
                track.extend(further)

    def _form_batch(self, now_s: float) -> None:
        """Admit, retract and ask the controller, in the engine's order."""
        state = self.state
        if self._visitors:
            self._let_in(now_s)
        if state.num_waiting or self._num_asking:
            self._admit(now_s)
        if state.kv_tokens + self._held_tokens + state.num_running > state.kv_capacity_tokens:
            self._make_room(now_s)
        if self._sees_next_batch:
            state.last_batch_size = state.num_running
            state.last_tokens = state.kv_tokens
            self._ask_controller(now_s)
        elif self._has_record:
            self._ask_controller(now_s)
        self._iteration += 1

    def _further_iterations(self, batch_size: int, tokens: int) -> int:
        """How many iterations after this one are sure to be like it."""
        # what a retraction has freed may let the next one in
        if self.state.num_waiting and self.has_room(tokens + batch_size):
            return 0
        # the next calls see this run's iterations: each the one to come, or the one before it
        seen_tokens = tokens if self._sees_next_batch else tokens - batch_size
        steady: Callable[[InstanceState, int, int], object] = self.controller.steady_iterations
        try:
            answer = steady(self.state, batch_size, seen_tokens)
        except Exception as error:  # noqa: BLE001 (a policy may raise anything)
            self.answers.fail("steady_iterations", error)
        if type(answer) is int and answer >= 0:  # as good as always: no call to check it
            further = answer
        else:
            further = self.answers.steady_iterations(answer)
        if further == 0:
            return 0
        order = self._finish_order
        while order[0] not in self._finishing:
            heappop(order)
        on_line = int(self.run.line_end_tokens - tokens) // batch_size
        further = min(further, order[0] - self._iteration, on_line)
        if batch_size > 1:
            room = self.state.kv_capacity_tokens - self._held_tokens - tokens
            further = min(further, room // batch_size - 1)
        return further

    def cut(self, now_s: float) -> None:
        """End the run with the iteration that is running now."""
        run = self.run
        count = run.ended_before(now_s) + 1
        if count < run.count:
            run.count, run.duration_s = count, run.elapsed_s(count)
            self.step_at(self, run.start_s + run.duration_s)

    def _end(self, now_s: float) -> None:
        count = self.run.count
        self._show(count)
        self._report_gaps(count)
        self._iteration += count - 1
        self._shown = 0
        self._has_record = True
        finished = self._finishing.pop(self._iteration, None)
        if finished is not None:
            self._leave(finished, now_s)

    def _show(self, ended: int) -> None:
        """Let the state show that so many iterations of the run have ended, energy aside."""
        state, run, batch_size = self.state, self.run, self._batch_size
        self._shown = ended
        tokens = self._batch_tokens + ended * batch_size
        state.kv_tokens = tokens
        state.last_batch_size = state.ended_batch_size = batch_size
        state.last_tokens = state.ended_tokens = tokens - batch_size
        state.last_duration_s = run.lead_s if ended == 1 else run.iteration_s(ended - 1)
        if self._joiners:
            self._first_tokens(run.start_s + run.lead_s)

    def _report_gaps(self, ended: int) -> None:
        """Tell the log of the token gaps of the first iterations, those it has heard of aside."""
        run, batch_size, begin = self.run, self._batch_size, self._reported
        if ended == begin:
            return
        self._reported = ended
        if begin == 0 and self._num_joiners:
            gaps = batch_size - self._num_joiners  # a joiner's first token is no gap
            if gaps:
                self.log.gaps(run.lead_s, 0.0, 1, gaps)
            if ended == 1:
                return
            begin = 1
        first_s = run.first_s + begin * run.step_s
        if run.multipliers is None:
            self.log.gaps(first_s, run.step_s, ended - begin, batch_size)
        else:
            part = run.multipliers[0][run.at + begin : run.at + ended]
            self.log.noisy_gaps(first_s, run.step_s, batch_size, part)

    def _first_tokens(self, now_s: float) -> None:
        """Joiners' first token of this stay: their very first, or one after a long gap."""
        log = self.log
        for request in self._joiners:
            if request.last_token_s == request.last_token_s:  # not NaN: it was retracted before
                log.gaps(now_s - request.last_token_s, 0.0, 1, 1)
            else:
                log.first_token(request, now_s)
        self._joiners.clear()

    def _leave(self, finished: list[SimRequest], now_s: float) -> None:
        state = self.state
        for request in finished:
            request.is_running = False
            state.num_running -= 1
            state.open_requests -= 1
            state.finished_requests += 1
            state.finished_tokens += request.output_tokens
            # its own steps here wrote one token each, on top of the context it joined with
            state.kv_tokens -= request.end_context_tokens
            self.log.finish(request, now_s)

    def _make_room(self, now_s: float) -> None:
        state, freed, fewest = self.state, self._freed_tokens, 0 if self._num_begun else 1
        while state.num_running > fewest:
            needed = state.kv_tokens + self._held_tokens + freed * state.num_running
            if needed <= state.kv_capacity_tokens:
                break
            self.retract(self.least_far(), now_s)
            self._join_order = [r for r in self._join_order if r.is_running]

    def least_far(self) -> SimRequest:
        """The running request with the fewest output tokens; see the class for ties."""
        latest = [r for r in reversed(self._join_order) if r.is_running]
        # all get one token an iteration: who has the fewest began last, its stays put together
        return max(latest, key=lambda r: (r.began(), r.input_tokens))

    def retract(self, request: SimRequest, now_s: float) -> None:
        state = self.state
        steps_left = request.finish_iteration - self._iteration
        request.is_running = False
        request.generated_tokens = request.end_context_tokens - request.input_tokens - steps_left
        if request in self._joiners:  # with the cache of prefixes: room is looked for after joining
            self._joiners.remove(request)  # no token since
        else:
            request.last_token_s = now_s
        context = request.input_tokens + request.generated_tokens
        filed = self._finishing[request.finish_iteration]
        filed.remove(request)
        if not filed:
            del self._finishing[request.finish_iteration]
        self._retracted.append(request)
        state.num_running -= 1
        state.kv_tokens -= context
        state.num_waiting += 1
        state.waiting_tokens += context
        self.num_retractions += 1
        request.retractions += 1
        self.log.retract(request)

    def _admit(self, now_s: float) -> None:
        state = self.state
        if self._has_admission:
            self._ask_admission()
        while state.num_waiting and self.has_room(state.kv_tokens):
            request = (self._retracted or self.waiting).popleft()
            context = request.input_tokens + request.generated_tokens
            state.num_waiting -= 1
            state.waiting_tokens -= context
            self.join(request, context, now_s)

    def _ask_admission(self) -> None:
        wanted, most = self.answers.admit_up_to(self.state), self._max_running
        self._most = most if wanted is None else min(max(wanted, 1), most)

    def has_room(self, kv_tokens: int) -> bool:
        """Whether the first in the queue may join those that run, with so many tokens in use.

        One that finds nobody there may: it fits alone, or it would have been rejected.
        """
        state = self.state
        if state.num_running == 0:
            return True
        if state.num_running >= self._most:
            return False
        first = (self._retracted or self.waiting)[0]
        context = first.input_tokens + first.generated_tokens
        reserve = self._reserve_tokens * (state.num_running + 1)
        return kv_tokens + context + reserve <= state.kv_capacity_tokens

    def join(self, request: SimRequest, context: int, now_s: float) -> None:
        state = self.state
        end = request.input_tokens + request.output_tokens - (0 if self._first_token_here else 1)
        request.end_context_tokens = end
        request.finish_iteration = self._iteration + end - context
        filed = self._finishing.get(request.finish_iteration)
        if filed is None:
            self._finishing[request.finish_iteration] = [request]
            heappush(self._finish_order, request.finish_iteration)
        else:
            filed.append(request)
        request.is_running = True
        self._join_order.append(request)
        if len(self._join_order) > 2 * state.num_running + 64:
            self._join_order = [r for r in self._join_order if r.is_running]
        state.num_running += 1
        state.kv_tokens += context
        if self._first_token_here or request.last_token_s == request.last_token_s:
            self._joiners.append(request)
        else:
            self.log.first_token(request, now_s)

    def _list_waiting(self) -> list[WaitingRequest]:
        return [r.as_waiting() for r in (*self._retracted, *self.waiting)]

    def _list_running(self) -> list[RunningRequest]:
        iteration = self._iteration + self._shown
        return [
            r.as_running(iteration, knows_length=self._length_oracle)
            for r in self._join_order
            if r.is_running
        ]
