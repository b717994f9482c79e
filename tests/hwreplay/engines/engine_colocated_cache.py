"""Run by the engine's own Python: what SGLang's radix cache makes of a run's events.

Cache, allocator, row pool and `release_kv_cache` are the real ones, on the CPU. What comes in as
JSON is who was looked at and let in, what each iteration computed, and who ended or was retracted;
what goes out is how many tokens each look found, and what is cached at the end.
"""

from __future__ import annotations

import json
import sys
from array import array
from types import SimpleNamespace as Made

import torch

from tests.hwreplay.engines import engine_radix_cache as real

kv_info = real.schedule_batch.ReqKvInfo
unset = Made(speculative_algorithm=None, strip_thinking_cache=False)
for module, getter in (
    (real.common, "get_spec"), (real.common, "get_serving"), (real.schedule_batch, "get_serving"),
):  # fmt: skip
    setattr(module, getter, lambda: unset)


class Request(real.Request):
    """One that decodes too: its prompt and all that it will put out."""

    skip_radix_cache_insert = False
    owned_kv_len = real.schedule_batch.Req.owned_kv_len
    finished_len, reasoning_tokens, is_over = None, 0, False

    def __init__(self, number: int, prompt: array[int], answer: array[int]) -> None:
        super().__init__(number, prompt)
        self.full_untruncated_fill_ids = prompt + answer
        self.rid, self.kv = str(number), kv_info()

    def refresh_fill_ids(self) -> None:
        """All tokens are known here from the start."""

    def finished(self) -> bool:
        return self.is_over


class Server(real.Server):
    """Memory and cache of one server of both phases."""

    def look(self, request: Request, context: int) -> int:
        tokens = request.full_untruncated_fill_ids[:context]
        real.common.match_kv_cache(request, self.cache, tokens, max_prefix_len=context - 1)
        return int(request.prefix_len)

    def admit(self, request: Request) -> None:
        """As `PrefillAdder` does: what was found is locked, and a row is its own."""
        request.lock = self.cache.lock(request.last_node)
        request.kv.req_pool_idx = self.rows.free_slots.pop()
        request.kv.cache_protected_len = request.prefix_len
        found = self.cache.path_device_indices(request.last_node)[: request.prefix_len]
        self.rows.write((request.kv.req_pool_idx, slice(0, len(found))), found.to(torch.int32))
        request.extend_end = request.prefix_len

    def resume(self, request: Request) -> None:
        """As a decode server does (`_bind_root_prefix`): its whole row is its own."""
        request.prefix_len, request.last_node = 0, self.cache.root_node
        self.admit(request)

    def compute(self, parts: list[tuple[Request, int]]) -> None:
        """As `alloc_for_extend` and `alloc_for_decode`: eviction for all at once, then the rows."""
        needed = sum(count for _, count in parts)
        real.common.evict_from_tree_cache(self.cache, needed)
        fresh = self.allocator.alloc(needed)
        assert fresh is not None
        for request, count in parts:
            end = request.extend_end + count
            place = request.kv.req_pool_idx, slice(request.extend_end, end)
            self.rows.write(place, fresh[:count].to(torch.int32))
            fresh = fresh[count:]
            request.extend_end = request.kv.kv_committed_len = request.kv.kv_allocated_len = end

    def let_go(self, request: Request, *, is_over: bool) -> None:
        request.is_over = is_over
        real.common.release_kv_cache(request, self.cache, checkpoint=is_over)
        request.kv = kv_info()


def main() -> None:
    """Play the events."""
    case = json.load(sys.stdin)
    starts: dict[int, int] = {}

    def ids(segments: list[list[int]]) -> array[int]:
        tokens: array[int] = array("q")
        for name, length in segments:
            start = starts.setdefault(name, 1_000_000 * (len(starts) + 1))
            tokens.extend(range(start, start + length))
        return tokens

    requests = [
        Request(number, ids(prompt), ids([answer]))
        for number, (prompt, answer) in enumerate(case["prompts"])
    ]
    longest = max(len(r.full_untruncated_fill_ids) for r in requests)
    server = Server(case["capacity_tokens"], 1, longest, len(requests))
    found = []
    for kind, *told in case["events"]:
        if kind == "look":
            found.append(server.look(requests[told[0]], told[1]))
        elif kind == "admit":
            server.admit(requests[told[0]])
        elif kind == "resume":
            server.resume(requests[told[0]])
        elif kind == "compute":
            server.compute([(requests[number], count) for number, count in told[0]])
        elif kind == "keep":
            real.common.checkpoint_kv_cache(requests[told[0]], server.cache)
        elif kind == "free":
            real.common.evict_from_tree_cache(server.cache, told[0])
        else:
            server.let_go(requests[told[0]], is_over=kind == "finish")
    json.dump({"found": found, "cached_tokens": server.cache.total_size()}, sys.stdout)


if __name__ == "__main__":
    main()
