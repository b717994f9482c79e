"""From a folder of tables whose times are closed forms to a profile."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiles.importing import folder as f
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.importing.build import (
    PREFILL_HOST_S,
    Builder,
    Source,
    build_profile,
    kv_capacity_tokens,
)
from voltana.profiles.importing.decoder import Decoder, load_decoder
from voltana.profiles.importing.power import load_clock_shape, load_power
from voltana.profiles.importing.systems import load_host, load_system
from voltana.profiles.importing.tables import KernelTables, open_tables
from voltana.sim.config import SimConfig
from voltana.sim.engine.simulate import simulate
from voltana.sim.workload.generate import make_workload

HOST = load_host(load_system("h100_sxm"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return f.make_tables(tmp_path_factory.mktemp("tables"))


def tables(root: Path, version: str | None = None) -> KernelTables:
    return open_tables(load_system("h100_sxm"), "sglang", version, root)


def source(root: Path, *, more: str = "", tp: int = 1, **named: str) -> Source:
    decoder = load_decoder(f.make_config(root, more), tp)
    power = load_power(named["power"]) if "power" in named else None
    clocks = load_clock_shape(named["clocks"]) if "clocks" in named else None
    return Source(tables=tables(root), decoder=decoder, power=power, clocks=clocks)


def top(builder: Builder, phase: str, batch: int, tokens: int) -> tuple[float, ...]:
    """Time in s and power in W at the top clock."""
    return builder.rows_at(phase, batch, tokens, (1980,))[0][-2:]


@pytest.fixture(scope="module")
def clocked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    made = source(root, power="h100", clocks="a100")
    return build_profile(made, tmp_path_factory.mktemp("clocked"))


def products_ms(m: float, tp: int, *, is_dense: bool = True) -> float:
    """Matrix products of one layer, written out."""
    wide = f.HEADS * f.DIM // tp
    found = f.gemm_ms(m, wide + 2 * f.KV_HEADS * f.DIM // tp, f.HIDDEN)
    found += f.gemm_ms(m, f.HIDDEN, wide)
    if is_dense:
        found += f.gemm_ms(m, 2 * f.INNER // tp, f.HIDDEN) + f.gemm_ms(m, f.HIDDEN, f.INNER // tp)
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_decode_is_the_sum_of_its_kernels(root: Path, tp: int) -> None:
    """Layers × (products + attention + all-reduces + host) + head + host of the requests."""
    made = Builder(source(root, tp=tp))
    for batch, context in ((1, 128), (16, 1024), (256, 512)):
        reduces = 0.0 if tp == 1 else 2 * f.reduce_ms(batch * f.HIDDEN, tp)
        layer = products_ms(batch, tp) + f.attention_ms(batch, context) + reduces
        head = f.gemm_ms(batch, f.WORDS // tp, f.HIDDEN)
        host_s = f.LAYERS * HOST.per_layer_s + batch * HOST.per_request_s
        wanted_s = 1e-3 * (f.LAYERS * layer + head) + host_s
        assert top(made, "decode", batch, batch * context)[0] == pytest.approx(wanted_s)


def test_prefill_is_the_sum_of_its_kernels(root: Path) -> None:
    batch, tokens = 4, 1024
    small_s = max(HOST.per_layer_s, tokens * (10 * f.HIDDEN + 3 * f.INNER) * 2 / (0.75 * 3.35e12))
    layer_s = 1e-3 * (products_ms(tokens, 1) + f.attention_ms(batch, 256)) + small_s
    wanted_s = f.LAYERS * layer_s + 1e-3 * f.gemm_ms(batch, f.WORDS, f.HIDDEN) + PREFILL_HOST_S
    assert top(Builder(source(root)), "prefill", batch, tokens)[0] == pytest.approx(wanted_s)


def test_experts_come_from_their_table(root: Path) -> None:
    more = ', "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256'
    batch, context = 16, 512
    router = f.gemm_ms(batch, 64, f.HIDDEN) * 8 / 64  # below the smallest n in proportion to it
    layer = products_ms(batch, 1, is_dense=False) + router + f.experts_ms(batch)
    layer += f.attention_ms(batch, context)
    host_s = f.LAYERS * HOST.per_layer_s + batch * HOST.per_request_s
    wanted_s = 1e-3 * (f.LAYERS * layer + f.gemm_ms(batch, f.WORDS, f.HIDDEN)) + host_s
    made = Builder(source(root, more=more))
    assert top(made, "decode", batch, batch * context)[0] == pytest.approx(wanted_s)


def test_experts_that_the_tables_lack_are_refused(root: Path) -> None:
    more = ', "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256'
    with pytest.raises(VoltanaError, match="no experts of small with TP1"):
        Builder(source(root, more=more))


def test_what_was_read_is_in_the_provenance(root: Path, clocked: Profile) -> None:
    stated = clocked.meta.provenance
    path = root / "systems/data/h100_sxm/gemm/sglang/0.5.14/gemm_perf.parquet"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in stated["tables_read"].source
    assert "moe" not in stated["tables_read"].source  # a dense model reads no experts
    assert (stated["decode_time"].status, stated["decode_power"].status) == ("calibrated",) * 2
    modelled = ("idle_power", "prefill_power", "prefill_time", "clock_dependence", "clocks")
    assert {stated[key].status for key in modelled} == {"modelled"}
    assert "measured" not in {p.status for p in stated.values()}


def test_a_foreign_device_is_refused(tmp_path: Path) -> None:
    """The 0.5.14 tables of one card once carried rows of another."""
    f.make_tables(tmp_path, device="NVIDIA GB300")
    with pytest.raises(VoltanaError, match="must be measured on NVIDIA H100 80GB HBM3, got device"):
        tables(tmp_path).read("gemm")


def test_the_newest_version_is_taken(tmp_path: Path) -> None:
    for version in ("0.5.9", "0.5.14", "0.5.14rc1", "0.5.2"):
        f.make_tables(tmp_path, version=version)
    assert tables(tmp_path).version == "0.5.14"
    assert tables(tmp_path, "0.5.9").version == "0.5.9"
    with pytest.raises(VoltanaError, match="of sglang in"):
        tables(tmp_path, "0.6")


def test_memory_decides_the_kv_capacity() -> None:
    """0.9 × 80 GiB - weights - 3.5 GiB, over the bytes of a token; a model too large is refused."""
    model = Decoder(
        name="m", layers=64, hidden=5120, intermediate=25600, heads=64, kv_heads=8, head_dim=128,
        vocabulary=151936, max_context_tokens=40960,
    )  # fmt: skip
    card = load_system("h100_sxm")
    weights = 2 * (64 * (5120 * 80 * 128 + 5120 * 64 * 128 + 3 * 5120 * 25600) + 2 * 151936 * 5120)
    free = 0.9 * 80 * 2**30 - weights - 3.5 * 2**30
    assert kv_capacity_tokens(card, model) == int(free / (2 * 64 * 8 * 128 * 2))
    with pytest.raises(VoltanaError, match=r"must fit the memory.*raise --tp"):
        kv_capacity_tokens(load_system("l40s"), model)


def test_experts_touched_and_paid_for() -> None:
    """One token reads its two experts of eight, many tokens all; arithmetic is that of two."""
    model = Decoder(
        name="m", layers=1, hidden=64, intermediate=32, heads=1, kv_heads=1, head_dim=64,
        vocabulary=64, max_context_tokens=64, experts=8, experts_per_token=2,
    )  # fmt: skip
    expert = 3 * 64 * 32
    dense = 64 * 192 + 64 * 64 + 8 * 64 + 64 * 64
    assert model.weights_read(1) == pytest.approx(dense + 2 * expert)
    assert model.weights_read(1000) == pytest.approx(dense + 8 * expert)
    assert model.flops(10) == pytest.approx(20 * (dense + 2 * expert))


@pytest.mark.parametrize(
    ("more", "tp", "words"),
    [
        ("", 3, "--tp must divide the 8 heads"),
        (', "model_type": "gpt2"', 1, "a model must be of type llama"),
        (', "num_key_value_heads": 2', 1, "no decode attention of 8 heads over 2 of 128"),
    ],
)
def test_models_that_do_not_fit(root: Path, more: str, tp: int, words: str) -> None:
    with pytest.raises(VoltanaError, match=words):
        Builder(source(root, more=more, tp=tp))


def test_clocks_need_power(root: Path) -> None:
    with pytest.raises(VoltanaError, match="--clock-shape must come with --power-from"):
        source(root, clocks="a100")
    with pytest.raises(VoltanaError, match=r"--power-from must be a shipped name.*'h100'"):
        load_power("h10")


def test_one_clock_serves_fixed_policies_alone(root: Path, tmp_path: Path) -> None:
    made = build_profile(source(root), tmp_path / "p")
    assert made.clocks_mhz == (1980,)
    requests = make_workload("sharegpt", rate_rps=2.0, duration_s=3.0, seed=1)
    config = SimConfig(profile="p", controller="static", router="round-robin", rate_rps=2.0)
    assert len(simulate(config, made, requests).instances) == config.num_prefill + config.num_decode
    refused = SimConfig(profile="p", controller="ecofreq", router="round-robin", rate_rps=2.0)
    with pytest.raises(VoltanaError, match="1980 MHz alone: import it with --power-from"):
        simulate(refused, made, requests)


def test_time_and_power_move_with_the_clock(clocked: Profile) -> None:
    """Below the power limit T = T_top·((1-s)(1 + sag·x²) + s(1 + x)), P = idle + active·phi."""
    made = clocked
    shape, power = load_clock_shape("a100"), load_power("h100")
    clock = made.clocks_mhz[0]
    batch, tokens = 64, 64 * 512
    top_s, low_s = (made.iteration_time_s("decode", c, batch, tokens) for c in (1980, clock))
    top_w, low_w = (made.power_w("decode", c, batch, tokens) for c in (1980, clock))
    x, share = 1980 / clock - 1, shape.decode_share[64.0]
    factor = (1 - share) * (1 + shape.sag * x * x) + share * (1 + x)
    assert low_s == pytest.approx(top_s * factor, rel=1e-3)
    assert clock == 990
    assert low_w == pytest.approx(
        power.idle_w[0.5] + (top_w - power.idle_w[1.0]) * shape.phi_at(0.5), rel=1e-3
    )


def test_a_card_at_its_limit_gains_nothing_from_higher_locks(root: Path) -> None:
    """The kernels were timed unlocked: where power holds the card back, the top locks are one."""
    made = source(root, power="h100", clocks="a100")
    assert made.power is not None
    hot = replace(made, power=replace(made.power, base_w=800.0))
    rows = Builder(hot).rows_at("decode", 8, 4096, (1500, 1905, 1980))
    assert rows[1][4:] == rows[2][4:]
    assert rows[2][5] == pytest.approx(700.0, rel=0.01)
    assert rows[2][4] == pytest.approx(top(Builder(made), "decode", 8, 4096)[0])
    assert rows[0][4] > rows[1][4]
    assert rows[0][5] < rows[1][5]
