"""The simulator's cache of prefixes against the installed SGLang's own cache and scheduler."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hwreplay.conftest import ENGINE
from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.sessions import random_sessions
from tests.sim.engine.test_prefix_cache import Watched
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.prefill import CachingPrefillInstance
from voltana.sim.workload.traces import open_trace
from voltana.sim.workload.workload import Workload

Event = tuple[str, int]


class Told(CachingPrefillInstance):
    """Notes what happens at its boundaries, and the batches that it forms."""

    def __init__(self, *args: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **named)
        self.events: list[Event] = []
        self.batches: list[list[list[int]]] = []

    def _enqueue(self, request: SimRequest, now_s: float) -> None:
        self.events.append(("arrive", request.request_id))
        super()._enqueue(request, now_s)

    def _form_batch(self, now_s: float) -> float:
        before = {r.request_id: r.prefilled_tokens for r in self._queue}
        attention = super()._form_batch(now_s)
        running = [*self._batch, *list(self._queue)[: self._batch_size - len(self._batch)]]
        found = {r.request_id: self.found.get(r.request_id, 0) for r in running}
        self.batches.append(
            [
                [i, start, r.prefilled_tokens - start]
                for r in running
                for i in (r.request_id,)
                for start in (before[i] or found[i],)
            ]
        )
        self.events.append(("form", 0))
        return attention

    def _holds(self, now_s: float) -> bool:
        held = super()._holds(now_s)
        if held and self._queue:  # it has looked, and found no room
            self.events.append(("form", 0))
            self.batches.append([])
        return held

    def _end(self, now_s: float) -> None:
        self.events.append(("end", 0))
        super()._end(now_s)
        self.events.append(("keep", 0))

    def release(self, request: SimRequest, now_s: float) -> None:
        self.events.append(("release", request.request_id))
        super().release(request, now_s)

    @property
    def found(self) -> dict[int, int]:
        """Tokens that were there, by request."""
        cached = self.log._log._cached_tokens  # type: ignore[attr-defined]
        return dict(enumerate(cached))


def mooncake() -> Workload:
    """The first 1,000 requests of the published trace, with its block hashes."""
    try:
        trace = open_trace("mooncake-conversation")
    except VoltanaError as error:
        pytest.skip(str(error))
    if trace.prompts is None:
        pytest.skip("the folder of traces holds no conversation_trace.jsonl, which has the hashes")
    return trace.sliced(0.0, float(trace.arrival_s[1000]))


CASES: dict[str, tuple[int, int, float]] = {
    "sessions": (3_000, 700, 0.0),
    "sessions, slow transfers": (3_000, 700, 0.08),
    "mooncake": (400_000, 16_384, 0.0),
}
"""KV memory and budget of a batch in tokens, seconds of a transfer."""


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_are_found_request_by_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    capacity_tokens, max_tokens, transfer_s = CASES[name]
    workload = (
        mooncake()
        if name == "mooncake"
        else random_sessions(4, count=1000, mean_gap_s=0.03, longest=300)
    )
    assert workload.prompts is not None
    monkeypatch.setattr("voltana.sim.engine.fleet.CachingPrefillInstance", Told)
    profile = write_synthetic_profile(tmp_path)
    watched = Watched(
        profile, workload, num_prefill=1, num_decode=1, prefix_cache_tokens=capacity_tokens,
        max_prefill_tokens=max_tokens, kv_transfer_latency_s=transfer_s, extrapolate=True,
        kv_capacity_tokens=10_000_000,
    )  # fmt: skip
    record = watched.fleet.run()
    ours = watched.fleet.prefill[0]
    assert isinstance(ours, Told)
    rows = [workload.prompts.prompt(row) for row in range(len(workload))]
    prompts = [
        [[n, int(t)] for n, t in zip(p.names, np.diff([0, *p.ends]), strict=True)] for p in rows
    ]
    case = {
        "prompts": prompts, "events": ours.events, "capacity_tokens": capacity_tokens,
        "max_tokens": max_tokens,
    }  # fmt: skip
    done = subprocess.run(
        [ENGINE / "venv" / "bin" / "python", "-W", "ignore",
         Path(__file__).parent / "engine_radix_cache.py"],
        input=json.dumps(case), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["batches"] == ours.batches
    assert theirs["cached_tokens"] == ours.cache.size_tokens
    cached = record.requests.cached_tokens
    assert cached is not None
    first: dict[int, int] = {}
    for batch in theirs["batches"]:
        for number, prefix, _ in batch:
            first.setdefault(number, prefix)
    assert [first[k] for k in range(len(workload))] == cached.tolist()
    assert (cached > 0).sum() > 200
    assert ours.cache.evicted_tokens > 10_000
