"""What an instance asks of its cache, noted and put to the installed SGLang's."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.hwreplay.conftest import ENGINE
from voltana.sim.engine.request import SimRequest
from voltana.sim.engine.reuse.held import HeldPrefixes
from voltana.sim.policies.parts.radix import RadixCache
from voltana.sim.workload.workload import Workload

Event = list[Any]
CAPACITY_TOKENS = 700


def note_cache(
    cache: RadixCache, held: HeldPrefixes, events: list[Event], uncomputed_tokens: int
) -> None:
    """Note from now on what is freed and kept.

    Args:
        cache: Of an instance.
        held: What requests of the instance hold.
        events: Takes the notes.
        uncomputed_tokens: Of a request's last tokens, those that are never in the cache.
    """
    free, keep = cache.free, held.keep

    def told_free(tokens: int) -> None:
        if tokens:
            events.append(["free", tokens])
        free(tokens)

    def told_keep(request: SimRequest, end: int) -> None:
        is_over = end + uncomputed_tokens == request.input_tokens + request.output_tokens
        events.append(["finish" if is_over else "keep", request.request_id])
        keep(request, end)

    cache.free = told_free  # type: ignore[method-assign]
    held.keep = told_keep  # type: ignore[method-assign]


def theirs_of(workload: Workload, events: list[Event]) -> dict[str, Any]:
    """What SGLang's cache and allocator find, asked the same in the same order."""
    prompts = workload.prompts
    assert prompts is not None
    assert prompts.answers is not None
    case = {
        "prompts": [
            [
                [[n, int(t)] for n, t in zip(p.names, np.diff([0, *p.ends]), strict=True)],
                [int(prompts.answers[row]), int(workload.output_tokens[row])],
            ]
            for row in range(len(workload))
            for p in (prompts.prompt(row),)
        ],
        "events": events,
        "capacity_tokens": CAPACITY_TOKENS,
    }
    done = subprocess.run(
        [ENGINE / "venv" / "bin" / "python", "-W", "ignore",
         "-m", "tests.hwreplay.engines.engine_colocated_cache"],
        input=json.dumps(case), capture_output=True, text=True, check=False, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
