"""The sglang engine's arithmetic and messages; tests/hwreplay has the real SGLang."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.profiles.device.standin import Standin
from tests.profiles.measure.test_measure import FACTS
from voltana.experiments.cli import make_app
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.engines.base import EngineCrashError, NotHeldError, Point
from voltana.profiles.engines.llama_config import load_shape
from voltana.profiles.engines.sglang import (
    Bursts,
    HeldStreams,
    SglangEngine,
    full_runs,
    graph_batch_sizes,
    steps_s,
)
from voltana.profiles.engines.sglang_attach import attach
from voltana.profiles.engines.sglang_client import Client, Endpoint, Endpoints, Records
from voltana.profiles.engines.sglang_metrics import IterationMetrics, is_whole
from voltana.profiles.engines.sglang_serving import Passage, ServingDelays, fit_delays

NOWHERE = Endpoint(url="http://h:1", metrics="")
CONFIG = (
    '{"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "head_dim": 128,'
    ' "vocab_size": 151936, "intermediate_size": 12288, "num_attention_heads": 32,'
    ' "num_key_value_heads": 8, "max_position_embeddings": 40960}'
)
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
    found = fit_delays(passages, kv_bytes_per_token=256)
    assert found.bytes_per_s is None
    assert found.handover_s == pytest.approx(0.0199)
    assert isinstance(found, ServingDelays)
    with pytest.raises(NotHeldError, match="2 ran alone"):
        fit_delays(passages[:2], kv_bytes_per_token=256)


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


def fake_python(path: Path) -> Path:
    """In place of a Python with SGLang: logs the cards it sees and its arguments, and ends."""
    path.write_text('#!/bin/sh\necho "cards $CUDA_VISIBLE_DEVICES"\necho "$@"\nexit 3\n')
    path.chmod(0o755)
    return path


def test_a_server_on_cards_gets_them_alone_and_prefills_long_prompts_whole(
    standin: Standin, tmp_path: Path
) -> None:
    standin["num_gpus"] = 2
    (tmp_path / "config.json").write_text(CONFIG)
    python = fake_python(tmp_path / "python")
    command = [
        *(
            sys.executable,
            "-m",
            "voltana.experiments.cli",
            "profile",
            "--engine",
            "sglang",
            "--gpu",
            "1,0",
        ),
        *("--model", str(tmp_path), "--server-python", str(python), "--out", str(tmp_path / "p")),
        *("--settle", "0", "--window", "0.01", "--trials", "1", "--server-args=--tp-size 4"),
    ]
    done = subprocess.run(command, env=standin.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "colocated-0 server ended with 3" in done.stderr.splitlines()[-1]
    cards, arguments = (tmp_path / "p" / "logs" / "colocated-0.log").read_text().splitlines()
    assert cards == "cards 1,0"
    assert "--chunked-prefill-size 16384 --tp-size 2" in arguments
    assert arguments.endswith("--tp-size 4")  # what the user says comes last, and so counts


@pytest.mark.parametrize(
    ("info", "sizes"),
    [
        (
            {"cuda_graph_bs": None, "internal_states": [{"decode_cuda_graph_bs": [1, 2, 8]}]},
            (1, 2, 8),
        ),
        ({"cuda_graph_bs": [4], "internal_states": [{"decode_cuda_graph_bs": []}]}, ()),
        ({"cuda_graph_bs": [4]}, ()),
    ],
)
def test_graph_sizes_are_those_captured(info: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert graph_batch_sizes(info) == sizes


class Answering(BaseHTTPRequestHandler):
    """Answers each prompt as the path says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "The input is too long"}}', NotHeldError),
        (200, b'data: {"error": {"message": "aborted"}}\n\ndata: [DONE]\n\n', NotHeldError),
        (200, b"data: {}", EngineCrashError),  # it ended in the middle
        (500, b"Internal Server Error", EngineCrashError),
        (200, b"data: [DONE]", None),
    ],
)
def test_a_refused_batch_is_no_crash(
    status: int, body: bytes, kind: type[VoltanaError] | None
) -> None:
    """A crash has the engine started again, and two in a row end the run."""
    server = HTTPServer(("127.0.0.1", 0), Answering)
    server.answer = (status, body)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}", metrics="")
    client = Client(Endpoints(prefill=endpoint, decode=endpoint), 100)
    try:
        asked = client.start([4], 2)
        if kind is None:
            asked.result()
        else:
            with pytest.raises(kind) as caught:
                asked.result()
            assert "\n" not in str(caught.value)
    finally:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_window_of_bursts_is_as_long_as_asked_pauses_included() -> None:
    """Bursts of 20 ms whose pass takes 1 ms: 0.1 s hold 5 of them, not 100."""
    client = Client(Endpoints(prefill=NOWHERE, decode=NOWHERE), 100)
    bursts = Bursts(Point(phase="prefill", batch_size=2, tokens=8), client, Records(""), FACTS)
    number = 0

    def burst() -> list[IterationMetrics]:
        nonlocal number
        number += 1
        time.sleep(0.02)
        return [passed(number, 2, time.monotonic(), took_s=0.001)]

    bursts.burst = burst  # type: ignore[method-assign]
    window = bursts.run(min_duration_s=0.1, min_iterations=1)
    client.close()
    assert len(window.iteration_s) == number <= 5
    assert set(window.iteration_s) == {0.001}


@pytest.mark.parametrize(
    ("context", "wanted_s", "output_tokens"),
    [
        (2048, 1.2, 1024),  # twelve times as long would be 1,536: more than half the context
        (2048, 0.4, 512),
        (2048, 0.1, 128),  # long enough as it is
        (256, 1.2, 128),  # the context may move by no more than half of it
    ],
)
def test_streams_run_long_enough_for_an_energy_of_their_own(
    context: int, wanted_s: float, output_tokens: int
) -> None:
    """Answers of 128 tokens run together for 0.1 s."""
    client = Client(Endpoints(prefill=NOWHERE, decode=NOWHERE), 100)
    point = Point(phase="decode", batch_size=2, tokens=2 * context)
    streams = HeldStreams(point, client, Records(""), FACTS)
    streams.stretch(0.1, wanted_s)
    client.close()
    assert streams.output_tokens == output_tokens


def test_attached_servers_are_not_restarted() -> None:
    engine = SglangEngine(lambda: attach(Path("f")), load_shape("llama-3.1-8b"), is_attached=True)
    with pytest.raises(EngineCrashError, match="start them and run the same command"):
        engine.restart()


def test_a_shape_without_weights_cannot_be_served(tmp_path: Path) -> None:
    asked = ["profile", "--engine", "sglang", "--model", "llama-3.1-8b", "--power-w", "1"]
    done = CliRunner().invoke(make_app(), [*asked, "--out", str(tmp_path / "p")])
    assert isinstance(done.exception, VoltanaError)
    assert "must be the folder of a model" in str(done.exception)


def test_shape_of_another_model_than_llama(tmp_path: Path) -> None:
    """Qwen3-8B: 36 layers x 8 KV heads x 128 x keys and values."""
    path = tmp_path / "config.json"
    path.write_text(CONFIG)
    assert load_shape(str(path)).kv_bytes_per_token(2) == 147_456
    assert load_shape("llama-3.1-8b").kv_bytes_per_token(2) == 131_072
