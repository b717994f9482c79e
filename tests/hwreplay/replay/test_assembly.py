"""A replay's files with caches, put together by hand-worked numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from voltana.hwreplay.replay.assembly import Window, assemble
from voltana.sim.config import make_config
from voltana.sim.records import COMPLETED
from voltana.sim.workload.workload import Workload


def test_chunks_of_a_prompt_are_not_found_in_a_cache(tmp_path: Path) -> None:
    """Both phases have a cache: 10 tokens come in chunks of 6 and 4, then 8 of which 3 are known.

    No turn waits, so that arrivals are the workload's and no row has to pair them.
    """
    work = Workload(
        arrival_s=np.array([0.0, 1.0]),
        input_tokens=np.array([10, 8]),
        output_tokens=np.ones(2, int),
    )
    rows = [
        {"request_id": i, "status": COMPLETED, "sent_s": i, "finish_s": i + 0.9, "prefill_id": 0,
         "decode_id": 0, "cached_tokens": found}
        for i, found in enumerate((0, 5))
    ]  # fmt: skip
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passes = [(0.1, 6, 0), (0.4, 4, 6), (1.1, 5, 3)]
    lines = [["prefill", 0, at_s, 0.2, 0.2, 1, new, 0, 0, before] for at_s, new, before in passes]
    (tmp_path / "iterations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    counters = [[phase, 0, t, t] for phase in ("prefill", "decode") for t in (0.0, 4.0)]
    (tmp_path / "energy.jsonl").write_text("".join(json.dumps(x) + "\n" for x in counters))
    told = {
        "num_prefill": 1, "num_decode": 1, "prefix_cache_tokens": 100, "decode_cache": True,
        "prefill_starts": "decode_boundary", "first_token": "prefill",
    }  # fmt: skip
    window = Window(start_s=0.0, is_complete=True, wall_s=1.0)
    record = assemble(tmp_path, work, make_config(told), window, {})
    prefill, decode = record.instances
    assert (prefill.cached_tokens, prefill.computed_tokens) == (3, 15)
    assert (decode.cached_tokens, decode.unsent_tokens) == (None, None)
    assert record.requests.workload_row is None
