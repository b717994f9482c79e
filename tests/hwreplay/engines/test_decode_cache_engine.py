"""What decode instances keep, against the installed SGLang's own cache and allocator."""

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
from voltana.sim.engine.reuse.decode import CachingDecodeInstance


class Told(CachingDecodeInstance):
    """Notes what it asks of its cache, one iteration a run."""

    def __init__(self, *args: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **named)
        self.events: list[Event] = []
        self.found: list[int] = []
        note_cache(self.cache, self.held, self.events, 0)

    def _fits(self, request: SimRequest) -> bool:
        tokens = request.input_tokens
        self.events.append(["look", request.request_id, tokens + 1])
        self.found.append(self.cache.count(self.held.whole(request), tokens))
        fits = super()._fits(request)
        if fits:
            self.events.append(["admit", request.request_id])
            self._compute([[request.request_id, tokens - self.found[-1]]])
        return fits

    def _set_aside(self, request: SimRequest, sign: int) -> None:
        if sign > 0 and request.retractions:
            self.events.append(["resume", request.request_id])
            self._compute([[request.request_id, request.input_tokens + request.generated_tokens]])
        super()._set_aside(request, sign)

    def _compute(self, parts: list[list[int]]) -> None:
        if parts[0][1]:
            self.events.append(["compute", parts])

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        self._compute([[r.request_id, 1] for r in self._join_order if r.is_running])

    def retract(self, request: SimRequest, now_s: float) -> None:
        self.events.append(["retract", request.request_id])
        super().retract(request, now_s)


@pytest.mark.engine
def test_the_same_tokens_are_found_look_by_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    workload = random_sessions(4, count=600, mean_gap_s=0.004, longest=60, has_answers=True)
    monkeypatch.setattr("voltana.sim.engine.fleet.decode_kind", lambda config: Told)
    settings = {
        "num_prefill": 1, "num_decode": 1, "decode_cache": True, "kv_reserve_tokens": 0,
        "prefill_starts": "decode_boundary", "kv_transfer_latency_s": 0.01, "extrapolate": True,
        "kv_capacity_tokens": CAPACITY_TOKENS, "kv_retract_tokens": 3, "engine": "reference",
    }  # fmt: skip
    watched = Watched(write_synthetic_profile(tmp_path), workload, **settings)
    record = watched.fleet.run()
    ours = watched.fleet.decode[0]
    assert isinstance(ours, Told)
    theirs = theirs_of(workload, ours.events)
    assert theirs["found"] == ours.found
    assert theirs["cached_tokens"] == ours.cache.size_tokens
    assert record.requests.retractions.sum() > 15
    assert ours.cache.evicted_tokens > 10_000
