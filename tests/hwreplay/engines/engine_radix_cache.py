"""Run by the engine's own Python: what SGLang's prefill server makes of a run's events.

Its radix cache, allocator, row pool and `PrefillAdder` are the real ones, on the CPU. What comes in
as JSON is when a prompt came, a batch was formed or had ended, and a transfer was over; what goes
out is each batch: who is in it, how much of the prompt was there, how much is computed.
"""

from __future__ import annotations

import importlib
import json
import sys
from array import array
from collections import deque
from types import SimpleNamespace as Made

import torch

base = importlib.import_module("sglang.srt.mem_cache.base_prefix_cache")
common = importlib.import_module("sglang.srt.mem_cache.common")
params = importlib.import_module("sglang.srt.mem_cache.cache_init_params")
pools = importlib.import_module("sglang.srt.mem_cache.memory_pool")
policy = importlib.import_module("sglang.srt.managers.schedule_policy")
radix = importlib.import_module("sglang.srt.mem_cache.radix_cache")
schedule_batch = importlib.import_module("sglang.srt.managers.schedule_batch")
token = importlib.import_module("sglang.srt.mem_cache.allocator.token")


class Request:
    """What the scheduler reads of a request."""

    _compute_max_prefix_len = schedule_batch.Req._compute_max_prefix_len
    needs_host_load_back = schedule_batch.Req.needs_host_load_back

    def __init__(self, number: int, tokens: array[int]) -> None:
        self.number = number
        self.full_untruncated_fill_ids = self.origin_input_ids = tokens
        self.output_ids: list[int] = []
        self.sampling_params = Made(max_new_tokens=1, ignore_eos=False)  # as prefill servers set it
        self.dllm_config = self.extra_key = self.cache_salt = self.lock = self.last_node = None
        self.return_logprob = self.retracted_stain = self.skip_radix_cache_insert = False
        self.priority = self.prefix_len = self.extend_end = 0
        self.auxiliary_swa_host_hit_length = self.host_loaded_length = 0
        self.storage_hit_length = self.storage_hit_start = 0
        self.host_hit_is_storage, self.cache_request_handle = False, None
        self.kv = Made(
            req_pool_idx=None, cache_protected_len=0, cache_inserted_len=0, swa_evict_floor=0,
            holds_mamba=False,
        )  # fmt: skip

    @property
    def extend_len(self) -> int:
        return self.extend_end - self.prefix_len

    def fulfilled_storage_hit_len(self, prefix_len: int) -> int:
        return 0

    def materialized_host_hit_len(self) -> int:
        return 0

    def is_dllm(self) -> bool:
        return False

    def finished(self) -> bool:
        return False


class Server:
    """Queue, memory and cache of one prefill server."""

    def __init__(self, capacity_tokens: int, max_tokens: int, longest: int, rows: int) -> None:
        self.max_tokens = max_tokens
        self.allocator = token.TokenToKVPoolAllocator(
            capacity_tokens, torch.float16, "cpu", None, need_sort=False
        )
        self.rows = pools.ReqToTokenPool(rows, longest, "cpu", enable_memory_saver=False)
        self.cache = radix.RadixCache(
            params.CacheInitParams(
                disable=False, req_to_token_pool=self.rows, page_size=1,
                token_to_kv_pool_allocator=self.allocator,
            )
        )  # fmt: skip
        self.queue: deque[Request] = deque()
        self.chunked: Request | None = None
        self.batch: list[Request] = []

    def form(self) -> list[list[int]]:
        """As `get_new_batch_prefill`: the request that was cut, then the queue in its order."""
        adder = policy.PrefillAdder(
            1, self.cache, self.allocator, None, 1.0, self.max_tokens, self.max_tokens
        )
        if self.chunked is not None:
            self.chunked = adder.add_chunked_req(self.chunked)
        while self.queue and adder.budget_state() != policy.AddReqResult.OTHER:
            request = self.queue[0]
            common.match_kv_cache(
                request, self.cache, request.full_untruncated_fill_ids,
                max_prefix_len=request._compute_max_prefix_len(len(request.origin_input_ids)),
            )  # fmt: skip
            request.kv.cache_protected_len = request.prefix_len
            verdict = adder.add_one_req(
                request, has_chunked_req=self.chunked is not None, truncation_align_size=None
            )
            if request in adder.can_run_list:
                self.queue.popleft()
            if verdict != policy.AddReqResult.CONTINUE:
                break
        if adder.new_chunked_req is not None:
            self.chunked = adder.new_chunked_req
        self.batch = adder.can_run_list
        self.take_memory()
        return [[r.number, r.prefix_len, r.extend_len] for r in self.batch]

    def take_memory(self) -> None:
        """As `alloc_for_extend`: eviction for the whole batch at once, then its rows."""
        needed = sum(r.extend_len for r in self.batch)
        common.evict_from_tree_cache(self.cache, needed)
        fresh = self.allocator.alloc(needed)
        assert fresh is not None
        at = 0
        for request in self.batch:
            if request.kv.req_pool_idx is None:
                request.kv.req_pool_idx = self.rows.free_slots.pop()
            row, prefix = request.kv.req_pool_idx, request.prefix_len
            path = self.cache.path_device_indices(request.last_node)
            self.rows.write((row, slice(0, prefix)), path[:prefix].to(torch.int32))
            part = fresh[at : at + request.extend_len].to(torch.int32)
            self.rows.write((row, slice(prefix, request.extend_end)), part)
            at += request.extend_len

    def end(self) -> None:
        """As `process_batch_result_disagg_prefill` for those whose prompts are done."""
        for request in self.batch:
            if request is not self.chunked:
                common.checkpoint_kv_cache(request, self.cache)

    def keep_chunk(self) -> None:
        """As `process_prefill_chunk`, before the next batch."""
        if self.chunked is not None and self.chunked in self.batch:
            common.checkpoint_kv_cache(self.chunked, self.cache)

    def release(self, request: Request) -> None:
        """As `release_kv_cache(checkpoint=True)` once decode has the keys and values."""
        self.cache.checkpoint(request, up_to=len(request.origin_input_ids))
        self.cache.unlock(request.lock)
        self.rows.free_slots.append(request.kv.req_pool_idx)


def main() -> None:
    """Play the events."""
    schedule = Made(schedule_policy="fcfs")
    features = Made(enable_encoder_swa_bounded_replay=False)
    for name, value in {"get_schedule": schedule, "get_exec": Made(features=features)}.items():
        setattr(policy, name, lambda value=value: value)
    case = json.load(sys.stdin)
    first_token: dict[int, int] = {}
    requests = []
    for number, segments in enumerate(case["prompts"]):
        tokens: array[int] = array("q")
        for name, length in segments:
            start = first_token.setdefault(name, 1_000_000 * (name + 1))
            tokens.extend(range(start, start + length))
        requests.append(Request(number, tokens))
    longest = max(len(r.origin_input_ids) for r in requests)
    server = Server(case["capacity_tokens"], case["max_tokens"], longest, len(requests))
    batches = []
    for kind, number in case["events"]:
        if kind == "arrive":
            server.queue.append(requests[number])
        elif kind == "form":
            batches.append(server.form())
        elif kind == "end":
            server.end()
        elif kind == "keep":
            server.keep_chunk()
        elif requests[number].lock is None:
            break  # it is not where it should be: the batches say why
        else:
            server.release(requests[number])
    cached = server.cache.total_size()
    json.dump({"batches": batches, "cached_tokens": cached}, sys.stdout)


if __name__ == "__main__":
    main()
