"""The torch engine at toy size on the CPU. Skipped where torch is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from tests.profiles.measure.quiet import Quiet  # noqa: E402
from voltana.profiles.common.errors import VoltanaError  # noqa: E402
from voltana.profiles.device.constant import ConstantPowerGpu  # noqa: E402
from voltana.profiles.device.lock import ClockSession  # noqa: E402
from voltana.profiles.engines.base import (  # noqa: E402
    EngineCrashError,
    OutOfMemoryError,
    Point,
)
from voltana.profiles.engines.llama import KvCache, Llama  # noqa: E402
from voltana.profiles.engines.llama_config import BUILT_IN, load_config  # noqa: E402
from voltana.profiles.engines.torch_llama import NUM_GRAPH_WARM_UP, TorchEngine, captured  # noqa: E402
from voltana.profiles.measure.campaign import Campaign, Plan  # noqa: E402
from voltana.profiles.measure.journal import Journal  # noqa: E402
from voltana.profiles.measure.trial import Protocol  # noqa: E402

TOY = BUILT_IN["toy"]


@pytest.mark.parametrize("prompt_tokens", [1, 5, 11])
def test_decode_with_the_cache_equals_the_full_forward(prompt_tokens: int) -> None:
    """Prefill some tokens, then decode the rest one by one: the same logits at every position.

    float64, so that the two orders of summation differ by rounding alone.
    """
    model = Llama(TOY, dtype=torch.float64, weight_std=0.25)
    ids = torch.randint(TOY.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    full_cache = KvCache.zeros(TOY, 3, 12, model.embedding)
    full = torch.nn.functional.linear(model.hidden(ids, 0, full_cache), model.head)
    cache = KvCache.zeros(TOY, 3, 12, model.embedding)
    first = model.forward(ids[:, :prompt_tokens], 0, cache)
    torch.testing.assert_close(first, full[:, prompt_tokens - 1], rtol=1e-9, atol=1e-9)
    for position in range(prompt_tokens, 12):
        step = model.forward(ids[:, position : position + 1], position, cache)
        torch.testing.assert_close(step, full[:, position], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cache.keys, full_cache.keys, rtol=1e-9, atol=1e-9)


def test_a_chunk_behind_a_prefix_equals_the_full_forward() -> None:
    model = Llama(TOY, dtype=torch.float64, weight_std=0.25)
    ids = torch.randint(TOY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    full = model.forward(ids, 0, KvCache.zeros(TOY, 2, 9, model.embedding))
    cache = KvCache.zeros(TOY, 2, 9, model.embedding)
    model.forward(ids[:, :4], 0, cache)
    torch.testing.assert_close(model.forward(ids[:, 4:], 4, cache), full, rtol=1e-9, atol=1e-9)


def test_a_chunk_beside_decoding_is_both_by_themselves() -> None:
    """In one pass over all their tokens, each sees its own cache and nothing of the other's."""
    model = Llama(TOY, dtype=torch.float64, weight_std=0.25)
    chunk = torch.randint(TOY.vocab_size, (1, 7), generator=torch.Generator().manual_seed(3))
    newest = torch.randint(TOY.vocab_size, (3, 1), generator=torch.Generator().manual_seed(4))
    prompt, running = (KvCache.random(TOY, n, 9, model.embedding) for n in (1, 3))
    pairs = [(chunk, 2, prompt), (newest, 8, running)]
    copies = [KvCache(keys=c.keys.clone(), values=c.values.clone()) for c in (prompt, running)]
    alone = [
        model.forward(ids, start, copy) for (ids, start, _), copy in zip(pairs, copies, strict=True)
    ]
    torch.testing.assert_close(model.mixed(pairs), torch.cat(alone), rtol=1e-9, atol=1e-9)
    for (_, _, cache), copy in zip(pairs, copies, strict=True):
        torch.testing.assert_close(cache.keys, copy.keys, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cache.values, copy.values, rtol=1e-9, atol=1e-9)


def test_the_logits_depend_on_every_cached_token() -> None:
    """Else the tests above would pass for a model that ignores its cache."""
    model = Llama(TOY, dtype=torch.float64, weight_std=0.25)
    ids = torch.zeros((1, 6), dtype=torch.long)
    base = model.forward(ids, 0, KvCache.zeros(TOY, 1, 6, model.embedding))
    for position in range(5):
        other = ids.clone()
        other[0, position] = 7
        changed = model.forward(other, 0, KvCache.zeros(TOY, 1, 6, model.embedding))
        assert float((changed - base).abs().max()) > 1e-3


def test_equals_the_transformers_library() -> None:
    transformers = pytest.importorskip("transformers")
    model = Llama(TOY, dtype=torch.float64, weight_std=0.25)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=TOY.hidden_size,
            intermediate_size=TOY.intermediate_size,
            num_hidden_layers=TOY.num_layers,
            num_attention_heads=TOY.num_heads,
            num_key_value_heads=TOY.num_kv_heads,
            head_dim=TOY.head_dim,
            vocab_size=TOY.vocab_size,
            rms_norm_eps=TOY.rms_norm_eps,
            rope_theta=TOY.rope_theta,
            tie_word_embeddings=False,
        )
    ).to(torch.float64)
    state = {
        "model.embed_tokens.weight": model.embedding,
        "lm_head.weight": model.head,
        "model.norm.weight": model.norm,
    }
    q, kv = TOY.num_heads * TOY.head_dim, TOY.num_kv_heads * TOY.head_dim
    for index, layer in enumerate(model.layers):
        stem = f"model.layers.{index}."
        query, key, value = torch.split(layer.qkv, (q, kv, kv))
        gate, up = torch.split(layer.gate_up, TOY.intermediate_size)
        state |= {
            stem + "self_attn.q_proj.weight": query,
            stem + "self_attn.k_proj.weight": key,
            stem + "self_attn.v_proj.weight": value,
            stem + "self_attn.o_proj.weight": layer.out,
            stem + "mlp.gate_proj.weight": gate,
            stem + "mlp.up_proj.weight": up,
            stem + "mlp.down_proj.weight": layer.down,
            stem + "input_layernorm.weight": layer.norm_attention,
            stem + "post_attention_layernorm.weight": layer.norm_mlp,
        }
    reference.load_state_dict(state)
    ids = torch.randint(TOY.vocab_size, (2, 10))
    with torch.inference_mode():
        expected = reference(ids).logits[:, -1]
    got = model.forward(ids, 0, KvCache.zeros(TOY, 2, 10, model.embedding))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # rope tables are float32


@pytest.mark.parametrize(("phase", "tokens"), [("prefill", 32), ("decode", 64)])
def test_a_window_reaches_both_minima(phase: str, tokens: int) -> None:
    with TorchEngine(TOY, device="cpu", dtype="float32") as engine:
        point = Point(phase=phase, batch_size=4, tokens=tokens)  # type: ignore[arg-type]
        with engine.open(point) as workload:
            window = workload.run(min_duration_s=0.0, min_iterations=5)
            longer = workload.run(min_duration_s=0.05, min_iterations=1)
    assert len(window.iteration_s) == 5
    assert window.elapsed_s == pytest.approx(sum(window.iteration_s), rel=1e-9)
    assert window.tokens == tokens
    assert longer.elapsed_s >= 0.05


def test_parameter_count_of_the_8b_shape() -> None:
    """8.03 billion, as the model card says."""
    assert BUILT_IN["llama-3.1-8b"].num_parameters == 8_030_261_248
    assert BUILT_IN["llama-3.1-8b"].kv_bytes_per_token(2) == 131_072


def test_config_json_is_read_and_others_refused(tmp_path: Path) -> None:
    data = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 96,
        "vocab_size": 300,
        "intermediate_size": 200,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    config = load_config(str(tmp_path))
    assert (config.head_dim, config.rope_theta, config.num_layers) == (16, 500000.0, 3)
    path.write_text(json.dumps(data | {"model_type": "mamba"}))
    with pytest.raises(VoltanaError, match="mamba"):
        load_config(str(path))
    del data["vocab_size"]
    path.write_text(json.dumps(data))
    with pytest.raises(VoltanaError, match="vocab_size"):
        load_config(str(path))
    with pytest.raises(VoltanaError, match=r"llama-3\.1-8b"):
        load_config("llama-3.1-8")


def test_cuda_without_cuda_is_one_clear_message() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(VoltanaError, match="--device cpu"):
        TorchEngine(TOY, device="cuda")


class RecordedCalls:
    """A recorder on the CPU: repeats the step itself, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        self.calls.append("record")
        output = step()

        def replay() -> object:
            self.calls.append("replay")
            output.copy_(step())
            return output

        return replay


def test_decode_is_warmed_up_apart_then_recorded_then_replayed_and_prefill_is_not() -> None:
    graphs = RecordedCalls()
    with TorchEngine(TOY, device="cpu", dtype="float32", graphs=graphs) as engine:
        with engine.open(Point(phase="prefill", batch_size=1, tokens=8)) as workload:
            workload.run(min_duration_s=0.0, min_iterations=2)
        assert graphs.calls == []
        with engine.open(Point(phase="decode", batch_size=1, tokens=8)) as workload:
            workload.run(min_duration_s=0.0, min_iterations=2)
    assert graphs.calls == ["enter", "leave", "record", "replay", "replay"]


def test_a_recorded_step_ran_on_the_side_stream_before() -> None:
    """Capture forbids first-time work (allocations, autotuning): it has happened by then."""
    graphs, seen = RecordedCalls(), []

    def step() -> Tensor:
        seen.append(tuple(graphs.calls))
        made: Tensor = torch.zeros(1)
        return made

    captured(step, graphs)
    assert seen == [*[("enter",)] * NUM_GRAPH_WARM_UP, ("enter", "leave", "record")]


def test_out_of_memory_at_a_point_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own forward runs; from batch 4 on it raises what torch raises on a full card."""
    forward = Llama.forward

    def full_from_batch_4(self: Llama, ids: Tensor, start: int, cache: KvCache) -> object:
        if ids.shape[0] >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return forward(self, ids, start, cache)

    monkeypatch.setattr(Llama, "forward", full_from_batch_4)
    log = Journal.open(tmp_path / "journal.jsonl")
    plan = Plan(
        clocks_mhz=None, phases=("decode",), budget_s=0.0, max_batch_size=4, max_tokens=16,
        protocol=Protocol(window_s=0.001, warm_up_s=0, settle_s=0, min_iterations=1, num_trials=1),
    )  # fmt: skip
    gpus = [ConstantPowerGpu(100.0)]
    with TorchEngine(TOY, device="cpu", dtype="float32") as engine, ClockSession(gpus) as session:
        Campaign(engine, gpus, plan, session, log, Quiet()).run()
    assert {point.batch_size for _, point in log.failures} == {4}
    for reason in log.failures.values():
        assert reason.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert {point.batch_size for _, point in log.points} == {1, 2}
    again = Journal.open(tmp_path / "journal.jsonl")
    assert all(again.is_done(*key) for key in log.failures)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA error: an illegal memory access was encountered\nMore", EngineCrashError),
        ("CUDA error: operation not permitted when stream is capturing", EngineCrashError),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", OutOfMemoryError),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", OutOfMemoryError),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", EngineCrashError),
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError),  # a mistake of ours
    ],
)
def test_errors_of_the_device_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception]
) -> None:
    def failing(*_: object) -> object:
        raise RuntimeError(said)

    monkeypatch.setattr(Llama, "forward", failing)
    with TorchEngine(TOY, device="cpu", dtype="float32") as engine:
        point = Point(phase="decode", batch_size=2, tokens=8)
        with pytest.raises(kind) as caught, engine.open(point) as workload:
            workload.run(min_duration_s=0.0, min_iterations=1)
        assert type(caught.value) is kind
        assert said.splitlines()[0] in str(caught.value)
        if kind is not RuntimeError:
            assert "batch 2 with 8 tokens (decode)" in str(caught.value)
        with pytest.raises(EngineCrashError, match="run the same command again"):
            engine.restart()


def test_running_out_while_capturing_is_no_crash() -> None:
    """Ending the capture raises its own error over that of the memory."""

    class Full(RecordedCalls):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    point = Point(phase="decode", batch_size=1, tokens=8)
    with (
        TorchEngine(TOY, device="cpu", dtype="float32", graphs=Full()) as engine,
        pytest.raises(OutOfMemoryError, match="must fit the memory"),
        engine.open(point),
    ):
        pass


def test_a_model_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.\nMore")

    monkeypatch.setattr(Llama, "__init__", full)
    with pytest.raises(
        OutOfMemoryError, match=r"the model toy must fit the memory: CUDA out of memory[^\n]*$"
    ):
        TorchEngine(TOY, device="cpu", dtype="float32").__enter__()


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("cpu", "bf16", "--dtype must be known, got 'bf16'"),
        ("cpu", "int8", "--dtype must be known"),
        ("cuda:1", "bfloat16", "choose the card with --gpu"),
        ("tpu", "bfloat16", "--device must be cuda or cpu"),
    ],
)
def test_unknown_types_and_devices_are_one_line(device: str, dtype: str, said: str) -> None:
    with pytest.raises(VoltanaError, match=said):
        TorchEngine(TOY, device=device, dtype=dtype)


def test_decode_reads_a_cache_that_toggles_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model is given, not what it leaves behind."""
    seen: list[KvCache] = []
    forward = Llama.forward

    def watched(self: Llama, ids: Tensor, start: int, cache: KvCache) -> Tensor:
        seen.append(KvCache(keys=cache.keys.clone(), values=cache.values.clone()))
        result: Tensor = forward(self, ids, start, cache)
        return result

    monkeypatch.setattr(Llama, "forward", watched)
    point = Point(phase="decode", batch_size=2, tokens=64)
    with TorchEngine(TOY, device="cpu", dtype="bfloat16") as engine, engine.open(point) as workload:
        workload.run(min_duration_s=0.0, min_iterations=1)
    for tensor in (seen[0].keys, seen[0].values):
        assert float(tensor.float().std()) == pytest.approx(1.0, abs=0.1)
