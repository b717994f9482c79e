"""What colocated instances keep, against the installed SGLang's own cache and allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.conftest import ENGINE
from tests.hwreplay.engines.told_cache import CAPACITY_TOKENS, Event, note_cache, theirs_of
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.sessions import random_sessions
from tests.sim.engine.test_prefix_cache import Watched
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.colocated import CachingColocatedInstance


class Told(CachingColocatedInstance):
    """Notes what it asks of its cache, one iteration a run."""

    def __init__(self, *args: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **named)
        self.events: list[Event] = []
        self.found: list[int] = []
        note_cache(self.cache, self.held, self.events, 1)
        match = self.cache.match
        self._looks = False

        def told_match(prompt: Any, limit: int) -> Any:  # noqa: ANN401
            node = match(prompt, limit)
            if self._looks:
                self._looks = False
                first = (self._retracted or self.waiting)[0]
                self.events.append(["look", first.request_id, limit + 1])
                self.found.append(node.end)
            return node

        self.cache.match = told_match  # type: ignore[method-assign]

    def _take_next(self, admits: bool) -> SimRequest | None:
        self._looks = True
        request = super()._take_next(admits)
        self._looks = False
        if request is not None:
            self.events.append(["admit", request.request_id])
        return request

    def _form_chunk(self, now_s: float, *, admits: bool) -> None:
        before = {r: r.prefilled_tokens for r in [self._partial] if r is not None}
        super()._form_chunk(now_s, admits=admits)
        here = [*self._ending, *([self._partial] if self._partial else [])]
        parts = []
        for request in here:
            start = before.get(request, self.held.nodes[request.request_id].end)
            parts.append([request.request_id, request.prefilled_tokens - start])
        if self.state.chunk_tokens:
            self.events.append(["compute", [part for part in parts if part[1]]])

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        if self._num_decoding:
            running = [r.request_id for r in self._join_order if r.is_running]
            self.events.append(["compute", [[number, 1] for number in running]])

    def retract(self, request: SimRequest, now_s: float) -> None:
        self.events.append(["retract", request.request_id])
        super().retract(request, now_s)


@pytest.mark.engine
def test_the_same_tokens_are_found_look_by_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    workload = random_sessions(4, count=600, mean_gap_s=0.03, longest=60, has_answers=True)
    monkeypatch.setattr("voltana.sim.engine.fleet.colocated_kind", lambda config: Told)
    settings = {
        "num_prefill": 0, "num_decode": 0, "num_colocated": 1, "colocated_cache": True,
        "colocated_order": "sglang-mixed", "kv_capacity_tokens": CAPACITY_TOKENS,
        "kv_reserve_tokens": 0, "kv_retract_tokens": 3, "max_prefill_tokens": 70,
        "extrapolate": True, "engine": "reference",
    }  # fmt: skip
    watched = Watched(write_synthetic_profile(tmp_path), workload, **settings)
    record = watched.fleet.run()
    ours = watched.fleet.decode[0]
    assert isinstance(ours, Told)
    theirs = theirs_of(workload, ours.events)
    assert theirs["found"] == ours.found
    assert theirs["cached_tokens"] == ours.cache.size_tokens
    assert record.requests.retractions.sum() > 20
    assert ours.cache.evicted_tokens > 10_000
