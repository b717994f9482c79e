"""The `sglang` engine: holds operating points on real SGLang servers, started here or attached to.

Decode: a batch of N prompts whose answers are long enough that all N run together for a while; the
context grows by one token a pass around the one asked for. Prefill: a burst of B prompts and one
output token. The times come from SGLang's own forward-pass metrics; passes that are not the point
asked for (a batch still filling, a burst taken in two) do not count.

    decode     prompts ──► batch fills … [ N streams, N streams, … N streams ] … batch empties
    prefill    burst ──► [ one pass ] ──► burst ──► [ one pass ] …
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Self

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.base import (
    MIXED,
    EngineCrashError,
    EngineFacts,
    NotHeldError,
    Point,
    PreparedPoint,
    Window,
)
from voltana.profiles.engines.llama_config import ModelShape
from voltana.profiles.engines.sglang_client import (
    HANDSHAKE_S,
    SETTLE_S,
    Answer,
    Client,
    Endpoint,
    Endpoints,
    Records,
    get_json,
    window_of,
)
from voltana.profiles.engines.sglang_metrics import IterationMetrics, is_whole
from voltana.profiles.engines.sglang_mixed import MixedStreams
from voltana.profiles.engines.sglang_serving import fit_delays, measure_passages, serving_table

CONTEXT_MARGIN: Final = 8
"""A prompt that fills the context is not taken whole: its answer needs room too."""
MIN_OUTPUT_TOKENS: Final = 32
USUAL_OUTPUT_TOKENS: Final = 128
MAX_OUTPUT_TOKENS: Final = 1024
OWN_ENERGY_S: Final = 1.2
"""A stretch so long is given an energy of its own by the meter, which asks for a second."""
MIN_RUN: Final = 3
"""Passes at the point, one after the other, that make a span worth timing."""
MISSING_S: Final = 2.0
POLL_S: Final = 0.001
QUEUED_BURSTS: Final = 2
"""One runs, one waits: a third would join the second's pass."""
MAX_HANDSHAKE_S: Final = 0.5
MAX_MISSES: Final = 8
"""Bursts in a row that the engine may take apart before the point is given up."""


class SglangEngine:
    """Servers with a loaded model."""

    def __init__(
        self,
        open_servers: Callable[[], AbstractContextManager[Endpoints]],
        shape: ModelShape,
        *,
        is_attached: bool = False,
    ) -> None:
        """Remember where the servers come from; `__enter__` starts or attaches.

        Args:
            open_servers: Gives the servers, ready, for as long as its context lasts.
            shape: Of the model that they serve.
            is_attached: They run already.
        """
        self._open_servers = open_servers
        self._shape = shape
        self._is_attached = is_attached
        self._stack = ExitStack()
        self._servers: Endpoints | None = None
        self._client: Client | None = None
        self._records: dict[Endpoint, Records] = {}
        self._info: dict[Endpoint, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            closing = stack.enter_context(ExitStack())  # last: ended servers answer no client
            servers = stack.enter_context(self._open_servers())
            for endpoint in {servers.prefill: 0, servers.decode: 0}:
                self._info[endpoint] = _server_info(endpoint)
                self._records[endpoint] = stack.enter_context(Records(endpoint.metrics))
            self._client = Client(servers, self._shape.vocab_size)
            closing.callback(self._client.close)
            self._servers = servers
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._servers = self._client = None

    @property
    def is_attached(self) -> bool:
        return self._is_attached

    def restart(self) -> None:
        if self._is_attached:
            raise EngineCrashError(
                "attached servers cannot be started again from here: start them and run the same "
                "command, finished points are kept"
            )
        self._stack.close()
        self.__enter__()

    def measure_serving(self) -> Mapping[str, Any]:
        passages = measure_passages(self.client, self.records(self.servers.prefill), self.facts)
        delays = fit_delays(passages, self.facts.kv_bytes_per_token)
        return serving_table(delays, self.facts, self.kv_reserve_tokens)

    @property
    def servers(self) -> Endpoints:
        """The servers, while they are open."""
        assert self._servers is not None, "enter the engine first"
        return self._servers

    @property
    def client(self) -> Client:
        """Sends prompts, while the servers are open."""
        assert self._client is not None, "enter the engine first"
        return self._client

    def records(self, endpoint: Endpoint) -> Records:
        """What a server reports."""
        return self._records[endpoint]

    @property
    def kv_reserve_tokens(self) -> int | None:
        """KV tokens that decode keeps free for each request at admission; None without a pair."""
        reserve = self._info[self.servers.decode].get("num_reserved_decode_tokens")
        return int(reserve) if self.servers.is_pair and reserve is not None else None

    @property
    def facts(self) -> EngineFacts:
        prefill, decode = (self._info[e] for e in (self.servers.prefill, self.servers.decode))
        chunk_tokens = int(prefill.get("chunked_prefill_size") or -1)
        budget_tokens = int(prefill["max_prefill_tokens"])
        context_tokens = int(decode.get("context_length") or self._shape.max_context_tokens)
        return EngineFacts(
            engine_name="sglang",
            engine_version=str(decode["version"]),
            model_name=self._shape.name,
            tensor_parallel=int(decode["tp_size"]),
            kv_bytes_per_token=self._shape.kv_bytes_per_token(_kv_element_bytes(decode)),
            max_context_tokens=context_tokens,
            max_prefill_tokens=min(budget_tokens, chunk_tokens if chunk_tokens > 0 else 2**31),
            max_running_requests=int(decode["max_running_requests"]),
            kv_capacity_tokens=int(decode["max_total_num_tokens"]),
            graph_batch_sizes=graph_batch_sizes(decode),
            min_context_tokens=1 + MIN_OUTPUT_TOKENS // 2,
            is_on_gpu=str(decode.get("device")) == "cuda",
            model_shape=dataclasses.asdict(self._shape),
            notes={
                "servers": "prefill and decode apart" if self.servers.is_pair else "one for both",
                "device": str(decode.get("device")),
                "dtype": str(decode.get("dtype")),
                "attention": str(decode.get("attention_backend")),
                "overlap": "off" if decode.get("disable_overlap_schedule") else "on",
                "kv reserve": f"{decode.get('num_reserved_decode_tokens')} tokens a request",
            },
        )

    def _require_mixed(self) -> None:
        if self.servers.is_pair or not self._info[self.servers.decode].get("enable_mixed_chunk"):
            raise NotHeldError(
                "a chunk beside decoding needs one server that does both phases, started with "
                "--enable-mixed-chunk: attach to one, or leave mixed out of --phases"
            )

    @contextmanager
    def open(self, point: Point) -> Iterator[PreparedPoint]:
        """A point, held by repeated batches of prompts; nothing runs before `PreparedPoint.run`."""
        if point.tokens % point.batch_size:
            raise VoltanaError(
                f"tokens must be a multiple of batch_size, got {point.tokens} and "
                f"{point.batch_size}: the sglang engine sends equal prompts"
            )
        if point.phase == "prefill":
            yield Bursts(point, self.client, self.records(self.servers.prefill), self.facts)
        elif point.phase == MIXED:
            self._require_mixed()
            yield MixedStreams(point, self.client, self.records(self.servers.decode), self.facts)
        else:
            yield HeldStreams(point, self.client, self.records(self.servers.decode), self.facts)


class Bursts:
    """Prefill: burst after burst, each one's pass timed by the engine itself.

    A server that does both phases has the next burst in its queue while one runs, so that passes
    follow each other; a pair is given one at a time, as each takes a handshake.
    """

    def __init__(self, point: Point, client: Client, records: Records, facts: EngineFacts) -> None:
        self._point = point
        self._client = client
        self._records = records
        length = point.tokens // point.batch_size
        client.handshake_s = HANDSHAKE_S  # what an earlier point needed is no measure for this one
        self._prompt_tokens = min(length, facts.max_context_tokens - CONTEXT_MARGIN)
        self._depth = 1 if client.servers.is_pair else QUEUED_BURSTS
        self._ahead: deque[Future[Answer]] = deque()
        """Bursts under way, the oldest first."""
        self._owed_tokens = 0
        """Of bursts that have ended, without a record so far."""
        self._is_first = True
        """The next one to be queued must not meet the one before it in the server's queue."""

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        passes: list[IterationMetrics] = []
        num_misses = 0
        self._records.take()
        begun_s = time.monotonic()  # pauses count: a pass of few tokens is a tenth of its burst
        while len(passes) < min_iterations or time.monotonic() - begun_s < min_duration_s:
            found = self.burst()
            passes += found
            num_misses = 0 if found else num_misses + 1
            if not found:
                self._client.handshake_s = min(2 * self._client.handshake_s, MAX_HANDSHAKE_S)
                passes += self._drain()  # two bursts that have met would go on meeting
            if num_misses >= MAX_MISSES // 2:
                self._depth = 1
            if num_misses >= MAX_MISSES:
                raise NotHeldError(
                    f"a burst must run in one pass, {num_misses} in a row of "
                    f"{self._point.batch_size} prompts with {self._point.tokens} tokens did not: "
                    "the engine takes fewer tokens at once (chunked prefill, its own limits)"
                )
        passes += self._drain()
        spans = [(p.start_s, p.received_s) for p in passes]
        tokens = sum(p.sum_prefill_tokens for p in passes) / len(passes)
        return window_of([p.wall_time_s for p in passes], tokens, spans)

    @property
    def _tokens(self) -> int:
        return self._prompt_tokens * self._point.batch_size

    def burst(self) -> list[IterationMetrics]:
        """Keep the queue filled and await the oldest: passes that ran as one burst since then."""
        while len(self._ahead) < self._depth:
            if self._ahead:
                time.sleep(self._client.handshake_s if self._is_first else 0.0)
                self._is_first = False
            lengths = [self._prompt_tokens] * self._point.batch_size
            self._ahead.append(self._client.start(lengths, 1, is_burst=True))
        return self._await_oldest()

    def _drain(self) -> list[IterationMetrics]:
        """Await all that is under way: nothing runs afterwards."""
        self._is_first = True
        return [record for _ in range(len(self._ahead)) for record in self._await_oldest()]

    def _await_oldest(self) -> list[IterationMetrics]:
        self._ahead.popleft().result()
        self._owed_tokens += self._tokens
        deadline_s = time.monotonic() + MISSING_S
        found = []
        while True:
            for record in self._records.take():
                self._owed_tokens -= record.sum_prefill_tokens + record.sum_prefill_kv_tokens
                if is_whole(record, self._point.batch_size, self._tokens):
                    found.append(record)
            if self._owed_tokens <= 0:
                return found
            if time.monotonic() >= deadline_s:
                self._owed_tokens = 0  # lost records do not come later
                return found
            time.sleep(POLL_S)


class HeldStreams:
    """Decode: N answers at once, timed while all N run."""

    def __init__(self, point: Point, client: Client, records: Records, facts: EngineFacts) -> None:
        self._batch_size = point.batch_size
        self._context = point.tokens // point.batch_size
        self._client = client
        self._records = records
        self._most_tokens = min(
            facts.max_context_tokens - 1, facts.kv_capacity_tokens // point.batch_size
        )
        self.output_tokens = min(max(self._context // 2, MIN_OUTPUT_TOKENS), USUAL_OUTPUT_TOKENS)

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        runs: list[list[IterationMetrics]] = []
        iteration_s: list[float] = []
        while len(iteration_s) < min_iterations or sum(iteration_s) < min_duration_s:
            found = full_runs(self._round(), self._batch_size)
            if found:
                longest_s = max(run[-1].received_s - run[0].received_s for run in found)
                self.stretch(longest_s, min(min_duration_s, OWN_ENERGY_S))
            else:
                self._lengthen()
            runs += found
            iteration_s += [step for run in found for step in steps_s(run)]
        tokens = [r.sum_decode_kv_tokens for run in runs for r in run[1:]]
        spans = [(run[0].received_s, run[-1].received_s) for run in runs]
        return window_of(iteration_s, sum(tokens) / len(tokens), spans)

    def _round(self) -> list[IterationMetrics]:
        """All records while one batch of answers is made."""
        output = min(self.output_tokens, self._most_tokens - 1)
        prompt = max(self._context - output // 2, 1)
        prompt = min(prompt, self._most_tokens - output)
        self._records.take()
        self._client.start([prompt] * self._batch_size, output, is_burst=True).result()
        time.sleep(SETTLE_S)
        return self._records.take()

    def stretch(self, longest_s: float, wanted_s: float) -> None:
        """Longer answers where the stretches are too short, as far as the context may move."""
        most = min(MAX_OUTPUT_TOKENS, self._context // 2, self._most_tokens - 1)
        if longest_s < wanted_s:
            needed = math.ceil(self.output_tokens * wanted_s / longest_s)
            self.output_tokens = max(self.output_tokens, min(needed, most))

    def _lengthen(self) -> None:
        """Many prompts reach decode one after another: the first must not end before the last."""
        if self.output_tokens >= min(MAX_OUTPUT_TOKENS, self._most_tokens - 1):
            raise NotHeldError(
                f"{self._batch_size} streams at a context of {self._context} tokens must run "
                "together, they never did: the engine admits fewer (its KV memory, its reserve "
                "for each request, or its limit of running requests)"
            )
        self.output_tokens *= 2


def full_runs(records: Sequence[IterationMetrics], batch_size: int) -> list[list[IterationMetrics]]:
    """Stretches of consecutive decode passes of just this batch size, `MIN_RUN` or longer."""
    runs: list[list[IterationMetrics]] = []
    for record in records:
        if record.num_decode_requests != batch_size or record.num_prefill_requests:
            continue
        if runs and runs[-1][-1].sequence + 1 == record.sequence:
            runs[-1].append(record)
        else:
            runs.append([record])
    return [run for run in runs if len(run) >= MIN_RUN]


def steps_s(run: Sequence[IterationMetrics]) -> list[float]:
    """Duration from boundary to boundary of every pass of a run but the first.

    A pass's own time is exact; when its record reaches us is not (a busy engine sends several at
    once), so that the host's time between passes is averaged over the run.

    Returns:
        Shape (len(run) - 1,).
    """
    passes_s = [record.wall_time_s for record in run[1:]]
    between_s = (run[-1].received_s - run[0].received_s - sum(passes_s)) / len(passes_s)
    return [pass_s + max(between_s, 0.0) for pass_s in passes_s]


def _server_info(endpoint: Endpoint) -> dict[str, Any]:
    """Arguments and state of a server, in one mapping."""
    info = dict(get_json(f"{endpoint.url}/server_info"))
    state = (info.get("internal_states") or [{}])[0]
    for name in ("max_running_requests", "max_total_num_tokens"):
        limit = state.get(f"effective_{name}_per_dp") or info.get(name) or state.get(name)
        if limit is None:
            raise VoltanaError(
                f"SGLang must name its {name}, {endpoint.url}/server_info does not: "
                "use SGLang 0.5.14 to 0.5.23"
            )
        info[name] = limit
    return info


def _kv_element_bytes(info: dict[str, Any]) -> int:
    """Bytes of a number in the KV cache."""
    kind = str(info.get("kv_cache_dtype"))
    kind = str(info.get("dtype")) if kind == "auto" else kind
    if kind.startswith("fp8"):
        return 1
    return 4 if kind == "float32" else 2


def graph_batch_sizes(info: dict[str, Any]) -> tuple[int, ...]:
    """Those that the server has captured; its arguments tell what was asked for."""
    state = (info.get("internal_states") or [{}])[0]
    return tuple(int(size) for size in state.get("decode_cuda_graph_bs") or ())
