"""Rows of measured serving, and the coefficients that are derived from them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.evidence import read_rows
from voltana.profiles.importing.fit import derive
from voltana.profiles.importing.systems import DATA


def configuration(**more: object) -> dict[str, object]:
    return {
        "gpu_model": "H100", "num_gpus": 2, "max_num_seqs": 8, "energy_per_token_joules": 2.0,
        "energy_per_request_joules": 1000.0, "median_itl_ms": 10.0, "avg_batch_size": 8.0,
        "output_throughput_tokens_per_sec": 400.0, **more,
    }  # fmt: skip


def test_a_task_and_a_model_file_say_the_same(tmp_path: Path) -> None:
    """1,000 J a request over 2 J a token are 500 tokens; 2 J × 400 tokens/s are 800 W."""
    task, model = tmp_path / "task.json", tmp_path / "model.json"
    task.write_text(json.dumps({"task": "t", "configurations": [configuration(model_id="a/b")]}))
    lengths = {"bins": [0, 1000], "counts": [7]}
    split = {"tensor_parallel": 1, "data_parallel": 2}
    model.write_text(
        json.dumps(
            {
                "task": "t", "model_id": "a/b", "weight_precision": "bfloat16",
                "output_length_distribution": lengths,
                "configurations": [configuration(parallelization=split)],
            }
        )
    )  # fmt: skip
    first, second = read_rows([task, model])
    for row in (first, second):
        assert (row.model, row.gpu, row.num_gpus) == ("a/b", "H100", 2)
        assert (row.output_tokens, row.power_w, row.itl_s) == (500.0, 800.0, 0.01)
        assert row.step_s == pytest.approx(8 / 400)
    assert (first.tensor_parallel, second.tensor_parallel) == (2, 1)
    # outputs of one length, seen at random while they run, are half written
    assert second.held_output_tokens == pytest.approx(250.0)


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"task": "t", "configurations": [{}]}')
    with pytest.raises(VoltanaError, match="must be a task's or a model's JSON"):
        read_rows([path])


def test_the_shipped_coefficients_are_those_of_the_sources(shared_data: Path) -> None:
    data = shared_data / "dvfs"
    if not (data / "ml_energy_v3").is_dir():
        pytest.skip(f"no measured rows in {data}")
    for name, content in derive(data, data / "aiconfigurator_sglang0.5.14").items():
        shipped = tomllib.loads((DATA / name).read_text(encoding="utf-8"))
        assert shipped == content, name
