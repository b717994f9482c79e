"""Run by the engine's own Python: what SGLang's code decides on the cases that come in as JSON.

The scheduler's methods are called as they are, on queues and requests that have what these read.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace as Made
from typing import Any

decode = importlib.import_module("sglang.srt.disaggregation.decode")
schedule_batch = importlib.import_module("sglang.srt.managers.schedule_batch")


def main() -> None:
    """Who is retracted in which order, and whether the first in the queue is admitted."""
    settings = {"get_schedule": Made(retraction_policy="default")}
    settings["get_disagg"] = Made(disaggregation_decode_enable_radix_cache=False)
    for module in (decode, schedule_batch):
        for name, value in settings.items():
            setattr(module, name, lambda value=value: value)
    cases = json.load(sys.stdin)
    order = schedule_batch.ScheduleBatch._get_decode_retraction_order
    batches = [[request(*row) for row in batch] for batch in cases["batches"]]
    retracted = [order(batch)[::-1] for batch in batches]  # it pops from the end
    admitted = [admits(**case) for case in cases["queues"]]
    json.dump({"retracted": retracted, "admitted": admitted}, sys.stdout)


def request(prompt: int, outputs: int, wanted: int) -> Made:
    """A request with that much of its answer."""
    return Made(
        origin_input_ids=[0] * prompt,
        output_ids=[0] * outputs,
        sampling_params=Made(max_new_tokens=wanted),
    )


def admits(
    running: list[list[int]], first: list[int], reserve_tokens: int, capacity_tokens: int
) -> bool:
    """The two numbers that `pop_preallocated` compares, with no transfer under way."""
    batch = [request(*row) for row in running]
    used = sum(len(r.origin_input_ids) + len(r.output_ids) for r in batch)
    queue: Any = object.__new__(decode.DecodePreallocQueue)
    queue.num_reserved_decode_tokens = reserve_tokens
    queue.retracted_queue = []
    queue.transfer_queue = Made(queue=[])
    queue.scheduler = Made(
        running_batch=Made(reqs=batch), waiting_queue=[], enable_hisparse=False, last_batch=None
    )
    queue.token_to_kv_pool_allocator = Made(
        available_size=lambda: capacity_tokens - used, page_size=1
    )
    queue._uses_swa_reservation = lambda: False
    budget = queue._allocatable_token_budgets(retractable_tokens=used)
    needed = queue._required_admission_tokens(request(*first), first[0], 0, used)
    return bool(needed <= budget)


if __name__ == "__main__":
    main()
