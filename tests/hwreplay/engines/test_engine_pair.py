"""The real SGLang on this CPU: prefill on one server, decode on two, KV over loopback, and the
agents that watch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.conftest import EngineFleet
from voltana.hwreplay.agent.agent import AgentConfig, await_agents, start_agents
from voltana.hwreplay.engines.plan import HOST
from voltana.hwreplay.engines.server import Server
from voltana.hwreplay.engines.shared_memory import find_shared_memory

OUTPUT_TOKENS = 12
PROMPT = list(range(3, 67))
ROOMS = count(1)


def generate(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.plan.url}/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def through(
    prefill: Server, decode: Server, prompt: list[int], output_tokens: int = OUTPUT_TOKENS
) -> tuple[list[int], list[int]]:
    """Output ids of the prefill server and of the decode server for one prompt."""
    body = {
        "input_ids": prompt,
        "sampling_params": {
            "temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True
        },
        "bootstrap_host": HOST,
        "bootstrap_port": prefill.plan.bootstrap_port,
        "bootstrap_room": next(ROOMS),
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda server: generate(server, body), (prefill, decode)))
    return answers[0]["output_ids"], answers[1]["output_ids"]


@pytest.mark.engine
@pytest.mark.slow
def test_both_decode_servers_continue_what_prefill_began(engine_fleet: EngineFleet) -> None:
    """The same prompt gives the same tokens wherever it is decoded, another prompt others."""
    first, second = (through(engine_fleet.prefill, d, PROMPT) for d in engine_fleet.decode)
    other = through(engine_fleet.prefill, engine_fleet.decode[0], list(range(103, 167)))
    assert len(first[0]) == 1
    assert len(first[1]) == OUTPUT_TOKENS
    assert first[1][0] == first[0][0]
    assert second == first
    assert other[1] != first[1]


def agent_config(server: Server, **values: Any) -> AgentConfig:  # noqa: ANN401
    assert server.plan.metrics is not None
    assert server.plan.batch_socket is not None
    defaults: dict[str, Any] = {
        "phase": server.plan.phase,
        "instance_id": server.plan.instance_id,
        "start_ns": time.monotonic_ns(),
        "settings": {
            "controller": "ecofreq",
            "prefill_controller": "static:f=1005",
            "router": "round-robin",
        },
        "metrics_address": server.plan.metrics,
        "batch_socket": str(server.plan.batch_socket),
    }
    return AgentConfig(**defaults | values)


@contextmanager
def agents(configs: list[AgentConfig], directory: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        processes = []
        for config in configs:
            processes.append(start_agents([config], directory))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].terminate)
        for process, config in zip(processes, configs, strict=True):
            await_agents(process, [config], directory)
        yield processes


@pytest.mark.engine
@pytest.mark.slow
def test_agents_hear_every_iteration_and_every_batch(
    engine_fleet: EngineFleet, tmp_path: Path
) -> None:
    """Two prompts, one after the other: two prefill batches, and each decode server runs one pass
    for each token but the first, which prefill has made; as it launches a pass before it has looked
    at the one before, it may run one more."""
    configs = [agent_config(server) for server in engine_fleet.servers]
    with agents(configs, tmp_path):
        time.sleep(2.5)  # the subscriptions stand, and idle servers have beaten
        for decode in engine_fleet.decode:
            through(engine_fleet.prefill, decode, PROMPT)
        time.sleep(1.5)
    reports = [json.loads((tmp_path / f"{c.name}.report.json").read_text()) for c in configs]
    prefill, *decodes = (r["counts"] for r in reports)
    assert prefill["records"] == prefill["decisions"] == 2
    for report in decodes:
        assert report["records"] == report["decisions"]
        assert report["records"] in (OUTPUT_TOKENS - 1, OUTPUT_TOKENS)
    for report in reports:
        batches = report["counts"]["records"]
        assert report["counts"]["notices"] in (batches, batches + 1)  # a new server says hello
        assert report["counts"]["heartbeats"] >= 1
        assert report["counts"]["lost_records"] == 0
        assert report["counts"].get("wrong_messages", 0) == 0
        assert report["loop_latency"]["num"] == batches
    decisions = [
        json.loads(line)["clock_mhz"]
        for line in (tmp_path / "agent-decode-0.decisions.jsonl").read_text().splitlines()
    ]
    assert decisions == [1005, 0]  # EcoFreq's lower level for one request; given back at the end


def test_shared_memory_of_a_process_group_is_found(tmp_path: Path) -> None:
    """A file and a semaphore of a child of the group's leader, and none that we have ourselves."""
    path = Path(f"/dev/shm/voltana-test-{os.getpid()}")
    child = (
        "import mmap, multiprocessing, os, sys, time\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT, 0o600)\n"
        "os.ftruncate(fd, 4096)\nm = mmap.mmap(fd, 4096)\nprint('mapped', flush=True)\n"
        "time.sleep(600)\n"
    )
    leader = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    found: list[Path] = []
    process = subprocess.Popen(
        [sys.executable, "-c", leader], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        found = find_shared_memory(process.pid)
        assert [p for p in found if not p.name.startswith("sem.mp-")] == [path]
        assert len(found) == 2
        assert path not in find_shared_memory(os.getpgrp())
    finally:
        os.killpg(process.pid, 9)
        process.communicate()
        for left in found:
            left.unlink(missing_ok=True)
