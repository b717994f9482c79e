"""Mixed iterations on a real SGLang server: single prompts sent into a decode batch that runs.

    streams    prompts ──► batch fills … [ N streams ……………………………………………… ] … batch empties
    chunks                                    [+]   [+]   [+]   [+]

Each prompt is one pass with the whole batch beside it, and the next one is sent when it has been
answered, with one token. Passes of the batch alone lie between, so that power is theirs too: where
a meter cannot tell the stretches apart, a trial says so.
"""

from __future__ import annotations

import time
from typing import Final

from voltana.profiles.engines.base import EngineFacts, NotHeldError, Point, Window
from voltana.profiles.engines.sglang_client import SETTLE_S, Client, Records, window_of
from voltana.profiles.engines.sglang_metrics import IterationMetrics, step_time_s

OUTPUT_TOKENS: Final = 128
MAX_OUTPUT_TOKENS: Final = 2048
Pass = tuple[IterationMetrics, float]
"""A pass of both, and its duration from boundary to boundary."""


class MixedStreams:
    """N answers at once, and prompts of one length beside them."""

    def __init__(self, point: Point, client: Client, records: Records, facts: EngineFacts) -> None:
        self._point = point
        self._client = client
        self._records = records
        self._output_tokens = OUTPUT_TOKENS
        self._most_tokens = min(
            facts.max_context_tokens - 1,
            (facts.kv_capacity_tokens - point.chunk_tokens) // point.batch_size,
        )

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        passes: list[Pass] = []
        while len(passes) < min_iterations or sum(s for _, s in passes) < min_duration_s:
            found = self._round()
            passes += found
            if not found:
                self._lengthen()
        tokens = sum(record.sum_decode_kv_tokens for record, _ in passes) / len(passes)
        spans = [(r.received_s - lasted_s, r.received_s) for r, lasted_s in passes]
        return window_of([lasted_s for _, lasted_s in passes], tokens, spans)

    def _round(self) -> list[Pass]:
        """The passes of both while one batch of answers is made."""
        context, size = self._point.tokens // self._point.batch_size, self._point.batch_size
        output = min(self._output_tokens, self._most_tokens - 1)
        prompt = min(max(context - output // 2, 1), self._most_tokens - output)
        self._records.take()
        streams = self._client.start([prompt] * size, output, is_burst=True)
        while not streams.done():
            self._client.start([self._point.chunk_tokens], 1).result()
        streams.result()
        time.sleep(SETTLE_S)
        records = self._records.take()
        return [
            (record, step_time_s(record, before))
            for before, record in zip([None, *records], records, strict=False)
            if self._is_held(record)
        ]

    def _is_held(self, record: IterationMetrics) -> bool:
        """Whether a pass has the whole prompt and the whole batch."""
        tokens = record.sum_prefill_tokens, record.sum_prefill_kv_tokens
        is_whole = tokens == (self._point.chunk_tokens, 0)
        return is_whole and record.num_decode_requests == self._point.batch_size

    def _lengthen(self) -> None:
        if self._output_tokens >= min(MAX_OUTPUT_TOKENS, self._most_tokens - 1):
            raise NotHeldError(
                f"a prompt of {self._point.chunk_tokens} tokens must run beside "
                f"{self._point.batch_size} streams at a context of "
                f"{self._point.tokens // self._point.batch_size}, it never did: the engine admits "
                "fewer, or takes fewer tokens at once"
            )
        self._output_tokens *= 2
