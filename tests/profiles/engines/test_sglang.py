"""The sglang engine's arithmetic and messages; tests/hwreplay has the real SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import make_app
from profiles.engines.base import NotHeldError
from profiles.engines.llama_config import load_shape
from profiles.engines.sglang import full_runs, steps_s
from profiles.engines.sglang_fleet import LaunchPlan, attach, start_servers
from profiles.engines.sglang_metrics import IterationMetrics, is_whole
from profiles.engines.sglang_serving import Overheads, Passage, fit_overheads
from profiles.errors import VoltanaError

PREFILL = "[[fleet.prefill]]\nurl = 'http://h:1'\nmetrics = 'a'\n"


def passed(sequence: int, batch_size: int, ended_s: float, *, took_s: float) -> IterationMetrics:
    return IterationMetrics(
        sequence=sequence,
        received_s=ended_s,
        wall_time_s=took_s,
        num_decode_requests=batch_size,
        sum_decode_kv_tokens=100 * batch_size,
    )


def test_only_unbroken_stretches_of_the_batch_asked_for_count() -> None:
    """Batch 2 at sequences 1-3 and 7-9; 5 stands alone, and 11 follows a lost record."""
    sizes = {0: 1, 1: 2, 2: 2, 3: 2, 4: 1, 5: 2, 6: 1, 7: 2, 8: 2, 9: 2, 11: 2, 12: 2}
    records = [passed(n, size, 0.01 * n, took_s=0.004) for n, size in sizes.items()]
    found = [[record.sequence for record in run] for run in full_runs(records, 2)]
    assert found == [[1, 2, 3], [7, 8, 9]]
    assert full_runs(records, 3) == []


def test_a_pass_that_prefills_too_is_no_decode_pass() -> None:
    mixed = IterationMetrics(
        sequence=2, received_s=0.02, wall_time_s=0.01, num_decode_requests=2, num_prefill_requests=1
    )
    records = [passed(1, 2, 0.01, took_s=0.01), mixed, passed(3, 2, 0.03, took_s=0.01)]
    assert full_runs(records, 2) == []


@pytest.mark.parametrize(
    ("num_prompts", "new", "cached", "is_taken"),
    [
        (4, 1024, 0, True),
        (4, 1021, 3, True),  # first tokens that a prefix cache knew
        (4, 1000, 24, False),  # more than 2 % cached
        (3, 1024, 0, False),  # other prompts
        (4, 512, 512, False),  # the second half of a chunked burst
        (4, 512, 0, False),  # the first
        (4, 1028, 0, False),
    ],
)
def test_a_burst_counts_where_it_ran_whole(
    num_prompts: int, new: int, cached: int, is_taken: bool
) -> None:
    record = IterationMetrics(
        sequence=1, received_s=1.0, wall_time_s=0.1, num_prefill_requests=num_prompts,
        sum_prefill_tokens=new, sum_prefill_kv_tokens=cached,
    )  # fmt: skip
    assert is_whole(record, 4, 1024) is is_taken


def test_time_between_passes_is_shared_and_late_records_cancel() -> None:
    """Three passes of 4, 4 and 10 ms in 30 ms: 4 ms of host time each.

    The second record comes late, with the third: the sum is right all the same.
    """
    run = [
        passed(1, 2, 1.000, took_s=0.5),
        passed(2, 2, 1.029, took_s=0.004),
        passed(3, 2, 1.029, took_s=0.004),
        passed(4, 2, 1.030, took_s=0.010),
    ]
    assert steps_s(run) == pytest.approx([0.008, 0.008, 0.014])
    assert sum(steps_s(run)) == pytest.approx(0.030)


def test_records_closer_together_than_their_passes_never_shorten_a_pass() -> None:
    run = [passed(n, 2, 1.0 + 0.001 * n, took_s=0.004) for n in range(4)]
    assert steps_s(run) == [0.004] * 3


def test_a_hand_over_that_does_not_grow_has_no_bandwidth() -> None:
    passages = [
        Passage(prompt_tokens=n, in_s=0.01, handover_s=0.02 - n * 1e-6) for n in (10, 100, 1000)
    ]
    found = fit_overheads(passages, kv_bytes_per_token=256)
    assert found.bytes_per_s is None
    assert found.handover_s == pytest.approx(0.0199)
    assert isinstance(found, Overheads)
    with pytest.raises(NotHeldError, match="2 ran alone"):
        fit_overheads(passages[:2], kv_bytes_per_token=256)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fleet = 1 = 2", "cannot read"),
        (PREFILL, "fleet.decode"),
        (
            f"{PREFILL}[[fleet.decode]]\nurl = 'http://h:2'\nmetrics = 'b'\n",
            "bootstrap_port",
        ),
        ('[[fleet.unified]]\nurl = "http://h:1"\n', "metrics"),
    ],
)
def test_an_incomplete_fleet_file_is_one_clear_message(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(VoltanaError, match=said), attach(path):
        pass


def test_a_unified_server_is_both(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[[fleet.unified]]\nurl = "http://h:1/"\nmetrics = "ipc:///a"\n')
    with attach(path) as servers:
        assert not servers.is_pair
        assert servers.decode.url == "http://h:1"


def test_without_sglang_the_remedy_is_named(tmp_path: Path) -> None:
    plan = LaunchPlan(
        python=tmp_path / "python", model="m", logs=tmp_path / "logs", is_cpu=True, is_pair=True
    )
    with pytest.raises(VoltanaError, match="make engine"), start_servers(plan):
        pass


def test_a_shape_without_weights_cannot_be_served(tmp_path: Path) -> None:
    asked = ["profile", "--engine", "sglang", "--model", "llama-3.1-8b", "--power-w", "1"]
    done = CliRunner().invoke(make_app(), [*asked, "--out", str(tmp_path / "p")])
    assert isinstance(done.exception, VoltanaError)
    assert "must be the folder of a model" in str(done.exception)


def test_shape_of_another_model_than_llama(tmp_path: Path) -> None:
    """Qwen3-8B: 36 layers x 8 KV heads x 128 x keys and values."""
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "head_dim": 128,'
        ' "vocab_size": 151936, "intermediate_size": 12288, "num_attention_heads": 32,'
        ' "num_key_value_heads": 8, "max_position_embeddings": 40960}'
    )
    assert load_shape(str(path)).kv_bytes_per_token(2) == 147_456
    assert load_shape("llama-3.1-8b").kv_bytes_per_token(2) == 131_072
