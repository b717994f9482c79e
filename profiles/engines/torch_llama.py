"""The `torch` engine: a Llama-shaped decoder run at held operating points, no server needed."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Protocol, Self

import torch

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.engines.base import (
    MIXED,
    EngineCrashError,
    EngineFacts,
    OutOfMemoryError,
    Point,
    PreparedPoint,
    Window,
)
from voltana.profiles.engines.llama import KvCache, Llama, Part
from voltana.profiles.engines.llama_config import LlamaConfig

MEMORY_FRACTION: Final = 0.9
CPU_KV_BYTES: Final = 64 * 2**20
MAX_PREFILL_TOKENS: Final = 16384
MAX_RUNNING_REQUESTS: Final = 1024
NUM_GRAPH_WARM_UP: Final = 3
DEVICES: Final = ("cuda", "cpu")
DTYPES: Final = ("bfloat16", "float16", "float32", "float64")
MEMORY_WORDS: Final = ("ALLOC_FAILED", "out of memory")
"""The former of libraries that allocate beside torch, as in CUBLAS_STATUS_ALLOC_FAILED."""
DEVICE_WORDS: Final = ("CUDA", "CUBLAS", "CUDNN")

Step = Callable[[], torch.Tensor]


class TorchEngine:
    """A model in this process."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: str = "cuda",
        dtype: str = "bfloat16",
        has_graphs: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        """Remember what to load; `__enter__` loads.

        Args:
            config: Shape of the model.
            device: "cuda" (the first card that CUDA sees) or "cpu".
            dtype: One of `DTYPES`.
            has_graphs: Replay decode from a CUDA graph (cuda only).
            graphs: What records decode in place of CUDA.
        """
        if dtype not in DTYPES:
            raise VoltanaError(f"--dtype must be known, got {dtype!r}{nearest(dtype, DTYPES)}")
        if device not in DEVICES:
            raise VoltanaError(
                f"--device must be cuda or cpu, got {device!r}: choose the card with --gpu"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise VoltanaError(
                f"--device must exist here, got {device!r} and torch sees no CUDA: "
                "use --device cpu, or install a CUDA build of torch"
            )
        self._config = config
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        is_recorded = has_graphs and self._device.type == "cuda"
        self._graphs = graphs or (CudaGraphs() if is_recorded else None)
        self._model: Llama | None = None

    def __enter__(self) -> Self:
        try:
            self._model = Llama(self._config, device=str(self._device), dtype=self._dtype)
        except RuntimeError as error:
            raise self._told(error, f"the model {self._config.name}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None
        self._give_memory_back()

    @property
    def is_attached(self) -> bool:
        return False

    def restart(self) -> None:
        raise EngineCrashError(
            "a process does not outlive an error of its CUDA context: run the same command again "
            "to go on, finished points are kept"
        )

    def measure_serving(self) -> None:
        return None

    @property
    def facts(self) -> EngineFacts:
        config = self._config
        per_token = config.kv_bytes_per_token(self._dtype.itemsize)
        capacity = self._kv_budget_bytes() // per_token
        return EngineFacts(
            engine_name="torch",
            engine_version=str(torch.__version__),
            model_name=config.name,
            tensor_parallel=1,
            kv_bytes_per_token=per_token,
            max_context_tokens=config.max_context_tokens,
            max_prefill_tokens=min(MAX_PREFILL_TOKENS, capacity),
            max_running_requests=min(MAX_RUNNING_REQUESTS, capacity),
            kv_capacity_tokens=capacity,
            graph_batch_sizes=(),
            is_on_gpu=self._device.type == "cuda",
            model_shape=dataclasses.asdict(config),
            notes={
                "dtype": str(self._dtype),
                "weights": "random",
                "kv cache": "contiguous",
                "attention": "torch scaled_dot_product_attention",
                "decode": "eager" if self._graphs is None else "CUDA graph",
                "prefill": "eager, so that short prompts cost what launching kernels from Python "
                "does",
                "device": str(self._device),
            },
        )

    @contextmanager
    def open(self, point: Point) -> Iterator[PreparedPoint]:
        """Allocate and warm the point up; free it afterwards."""
        if point.tokens % point.batch_size:
            raise VoltanaError(
                f"tokens must be a multiple of batch_size, got {point.tokens} and "
                f"{point.batch_size}: the torch engine runs equal sequences"
            )
        try:
            yield _Loop(self._iteration(point), point.tokens, self._device)
        except RuntimeError as error:
            what = f"batch {point.batch_size} with {point.tokens} tokens ({point.phase})"
            raise self._told(error, what) from None
        finally:
            self._give_memory_back()

    def _told(self, error: RuntimeError, what: str) -> Exception:
        """Torch's error as one that the profiler knows; itself where it is a mistake of ours."""
        text = str(error)
        said = text.splitlines()[0] if text else type(error).__name__
        if _is_lack_of_memory(error):
            return OutOfMemoryError(f"{what} must fit the memory: {said}")
        if any(word in text.upper() for word in DEVICE_WORDS):
            return EngineCrashError(f"CUDA must survive {what}, it failed: {said}")
        return error

    def _give_memory_back(self) -> None:
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # of a broken context, whose error is on its way already
                torch.cuda.empty_cache()

    def _kv_budget_bytes(self) -> int:
        if self._device.type != "cuda":
            return CPU_KV_BYTES
        total = torch.cuda.get_device_properties(self._device).total_memory
        weights = self._config.num_parameters * self._dtype.itemsize
        logits = MAX_RUNNING_REQUESTS * self._config.vocab_size * self._dtype.itemsize
        activations = 8 * MAX_PREFILL_TOKENS * self._config.intermediate_size * self._dtype.itemsize
        return max(int(total * MEMORY_FRACTION) - weights - logits - activations, 0)

    def _iteration(self, point: Point) -> Callable[[], object]:
        """One iteration of the point, ready to be called again and again."""
        assert self._model is not None, "enter the engine first"
        model, length = self._model, point.tokens // point.batch_size
        batch = self._batch(point.batch_size, length, length if point.phase == "prefill" else 1)
        if point.phase == MIXED:
            chunk = self._batch(1, point.chunk_tokens, point.chunk_tokens)
            return lambda: model.mixed((chunk, batch)).argmax(dim=-1)

        def step() -> torch.Tensor:
            return model.forward(*batch).argmax(dim=-1)

        if self._graphs is not None and point.phase == "decode":
            return captured(step, self._graphs)
        return step

    def _batch(self, batch_size: int, length: int, new: int) -> Part:
        """Random tokens behind a random cache; the newest sees all others and itself.

        Args:
            batch_size: Sequences.
            length: Tokens of each, the new ones counted.
            new: Tokens of each that are computed.
        """
        assert self._model is not None
        ids = torch.randint(self._config.vocab_size, (batch_size, new), device=self._device)
        cache = KvCache.random(self._config, batch_size, length, self._model.embedding)
        return ids, length - new, cache


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came upon, is: ending a capture that ran out raises another error."""
    if error is None:
        return False
    is_so = isinstance(error, torch.OutOfMemoryError)
    is_so = is_so or any(word in str(error) for word in MEMORY_WORDS)
    return is_so or _is_lack_of_memory(error.__context__)


class _Loop:
    """Runs a callable back to back and times each round, the device's work included."""

    def __init__(self, iteration: Callable[[], object], tokens: int, device: torch.device) -> None:
        self._iteration = iteration
        self._tokens = tokens
        self._is_cuda = device.type == "cuda"
        self._device = device

    def run(self, *, min_duration_s: float, min_iterations: int) -> Window:
        self._synchronize()
        boundaries_ns = [time.monotonic_ns()]
        end_ns = boundaries_ns[0] + int(min_duration_s * 1e9)
        while len(boundaries_ns) <= min_iterations or boundaries_ns[-1] < end_ns:
            self._iteration()
            self._synchronize()
            boundaries_ns.append(time.monotonic_ns())
        steps = itertools.pairwise(boundaries_ns)
        return Window(
            iteration_s=tuple((after - before) * 1e-9 for before, after in steps),
            elapsed_s=(boundaries_ns[-1] - boundaries_ns[0]) * 1e-9,
            tokens=float(self._tokens),
            spans_ns=((boundaries_ns[0], boundaries_ns[-1]),),
        )

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)


class Graphs(Protocol):
    """Records work once and repeats it without the host."""

    def side_stream(self) -> AbstractContextManager[object]:
        """Work inside runs apart from the current stream and is waited for at the end."""

    def record(self, step: Step) -> Callable[[], object]:
        """Run `step` once, recording; returns what repeats it."""


class CudaGraphs:
    """CUDA graphs of the current device."""

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        cuda: Any = torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            yield
        cuda.current_stream().wait_stream(stream)

    def record(self, step: Step) -> Callable[[], object]:
        cuda: Any = torch.cuda
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            output = step()

        def replay() -> object:
            graph.replay()
            return output, step  # keeps alive the tensors that the graph reads and writes

        return replay


def captured(step: Step, graphs: Graphs) -> Callable[[], object]:
    """Warm `step` up on a side stream, as capture demands, and record it; returns its replay."""
    with graphs.side_stream():
        for _ in range(NUM_GRAPH_WARM_UP):
            step()
    return graphs.record(step)
