"""The agent's process with the real actuator on the emulated card, while all is well or is not."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.hwreplay.actuator.conftest import actuator_process, eventually
from tests.hwreplay.engine_voice import EngineVoice, repeating
from tests.hwreplay.messages.test_batch_feed import batch, plugin  # noqa: F401 (fixture)
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import Standin
from voltana.hwreplay.agent.agent import AgentConfig, await_agents, start_agents
from voltana.hwreplay.agent.loop_record import StaleLimits
from voltana.hwreplay.messages.agent_reports import ReportFeed
from voltana.hwreplay.messages.events import Event, EventPublisher
from voltana.hwreplay.view.context import PolicySource
from voltana.profiles.catalog import load_profile
from voltana.sim.config import make_config

pytestmark = pytest.mark.slow

SMALL = (1, 500)
"""Decode batch (requests, context tokens) that fits 60 ms at 1005 MHz on the A100 profile."""
LARGE = (400, 400_000)
"""One that does not: EcoFreq's top level, 1410 MHz."""
SETTINGS = {"controller": "ecofreq", "router": "round-robin", "num_prefill": 1, "num_decode": 1}
PATIENT = StaleLimits(least_s=60.0, most_s=60.0)
GENEROUS = StaleLimits(least_s=0.4)
"""The tests' machine may be busy; what staleness is, test_control.py says to the millisecond."""


def config_of(tmp_path: Path, voice: EngineVoice, **values: Any) -> AgentConfig:  # noqa: ANN401
    defaults: dict[str, Any] = {
        "phase": "decode",
        "instance_id": 0,
        "start_ns": time.monotonic_ns(),
        "settings": SETTINGS,
        "metrics_address": voice.address,
        "stale": PATIENT,
    }
    return AgentConfig(**defaults | values)


@contextmanager
def running(config: AgentConfig, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = start_agents([config], directory)
    try:
        await_agents(process, [config], directory)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def voice(tmp_path: Path) -> Iterator[EngineVoice]:
    found = EngineVoice(tmp_path / "metrics")
    yield found
    found.close()


@pytest.fixture
def card(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Standin]:
    """The emulated card with an actuator on tmp_path/actuator; agents see the same card."""
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)
    with actuator_process(standin, tmp_path / "actuator", "--silence-s", "0.6"):
        yield standin


def with_actuator(tmp_path: Path, voice: EngineVoice, **values: Any) -> AgentConfig:  # noqa: ANN401
    return config_of(
        tmp_path, voice, actuator_socket=str(tmp_path / "actuator"), gpus=(0,), **values
    )


def report_of(config: AgentConfig, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"{config.name}.report.json").read_text())
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_card_follows_the_engine_and_is_given_back(
    card: Standin, tmp_path: Path, voice: EngineVoice
) -> None:
    config = with_actuator(tmp_path, voice)
    with running(config, tmp_path) as process:
        for load, clock_mhz in ((SMALL, 1005), (LARGE, 1410), (SMALL, 1005)):
            with repeating(lambda load=load: voice.decode(*load)):  # type: ignore[misc]
                assert eventually(lambda mhz=clock_mhz: card["locked_mhz"] == mhz)  # type: ignore[misc]
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert eventually(lambda: card["locked_mhz"] == 0)
    report = report_of(config, tmp_path)
    counts = report["counts"]
    assert counts["records"] == counts["decisions"] == report["loop_latency"]["num"]
    assert counts["lost_records"] == 0
    assert report["loop_latency_written"]["num"] == 2  # EcoFreq begins at its lowest clock
    assert sum(n for _, n in report["loop_latency"]["histogram"]) == counts["decisions"]
    changes = lines_of(tmp_path / "agent-decode-0.clocks.jsonl")
    assert [c["clock_mhz"] for c in changes if c["clock_mhz"]] == [1005, 1410, 1005]
    assert changes[-1]["clock_mhz"] == 0
    times_s = [c["at_s"] for c in changes]
    assert times_s == sorted(times_s)
    assert 0 < times_s[0] < times_s[-1] < (time.monotonic_ns() - config.start_ns) * 1e-9


def test_where_clocks_cannot_be_locked_the_agent_limits_power(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1005 MHz stands for the most that the profile's card draws there in decode, rounded up."""
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)
    table = load_profile("a100-80g-sxm/llama-3.1-8b").decode
    limit_w = math.ceil(table[table["frequency_mhz"] == 1005]["power_w"].max())
    assert 100 < limit_w < 400  # within the card's range, so that it is the table's word
    with (
        actuator_process(standin, tmp_path / "actuator", "--power-cap"),
        running(with_actuator(tmp_path, voice, stale=GENEROUS), tmp_path),
    ):
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: standin["limit_mw"] == limit_w * 1000)
        assert eventually(lambda: standin["limit_mw"] == 400_000)  # silence: the safe state
    assert standin["num_locks"] == 0


def test_a_frozen_agent_loses_its_clock_and_takes_it_again(
    card: Standin, tmp_path: Path, voice: EngineVoice
) -> None:
    """Its metrics never count as stale: only the actuator's patience ends."""
    never = StaleLimits(least_s=600.0, most_s=600.0, dead_s=600.0)
    config = with_actuator(tmp_path, voice, stale=never)
    with (
        running(config, tmp_path) as process,
        repeating(lambda: voice.decode(*SMALL)),
    ):
        assert eventually(lambda: card["locked_mhz"] == 1005)
        process.send_signal(signal.SIGSTOP)
        assert eventually(lambda: card["locked_mhz"] == 0)
        process.send_signal(signal.SIGCONT)
        assert eventually(lambda: card["locked_mhz"] == 1005)
    counts = report_of(config, tmp_path)["counts"]
    # a machine that gives an agent no time for 0.6 s makes it lose the actuator once more
    assert 1 <= counts["actuator_reconnected"] <= counts["actuator_lost"]


def test_metrics_that_stop_unlock_and_that_come_again_lock(
    card: Standin, tmp_path: Path, voice: EngineVoice
) -> None:
    config = with_actuator(tmp_path, voice, stale=GENEROUS)
    with running(config, tmp_path):
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: card["locked_mhz"] == 1005)
        assert eventually(lambda: card["locked_mhz"] == 0)
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: card["locked_mhz"] == 1005)
    states = report_of(config, tmp_path)["safe_states"]
    assert "no metrics for" in states[0]["reason"]
    assert states[0]["until_s"] > states[0]["at_s"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_dead_agent_leaves_no_lock(
    card: Standin, tmp_path: Path, voice: EngineVoice, signum: signal.Signals
) -> None:
    with (
        running(with_actuator(tmp_path, voice), tmp_path) as process,
        repeating(lambda: voice.decode(*SMALL)),
    ):
        assert eventually(lambda: card["locked_mhz"] == 1005)
        process.send_signal(signum)
        assert eventually(lambda: card["locked_mhz"] == 0)
        process.wait(20)
        assert card["num_resets"] == 1


def test_an_agent_ends_with_its_parent(card: Standin, tmp_path: Path, voice: EngineVoice) -> None:
    config = with_actuator(tmp_path, voice)
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from voltana.hwreplay.agent.agent import read_agent_config, start_agents\n"
        f"d = Path({str(tmp_path)!r})\n"
        "p = start_agents([read_agent_config(d / 'agent-decode-0.json')], d)\n"
        "print(p.pid, flush=True)\ntime.sleep(600)\n"
    )
    with running(config, tmp_path):
        pass  # writes the configuration's file
    parent = card.popen(code)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: card["locked_mhz"] == 1005)
            parent.kill()
            assert eventually(lambda: card["locked_mhz"] == 0)
            assert eventually(lambda: not is_alive(pid))
    finally:
        parent.kill()
        parent.communicate()


def is_alive(pid: int) -> bool:
    """Whether a process runs; an orphan's zombie is none of ours to reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_killed_actuator_restores_and_a_new_one_is_found(
    standin: Standin,  # noqa: F811
    tmp_path: Path,
    voice: EngineVoice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in standin.env.items():
        monkeypatch.setenv(key, value)
    config = with_actuator(tmp_path, voice)
    with actuator_process(standin, tmp_path / "actuator") as actuator:
        agent = start_agents([config], tmp_path)
        await_agents(agent, [config], tmp_path)
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: standin["locked_mhz"] == 1005)
            actuator.kill()
            assert eventually(lambda: standin["locked_mhz"] == 0)  # the watchdog
            with actuator_process(standin, tmp_path / "actuator"):
                assert eventually(lambda: standin["locked_mhz"] == 1005)
                agent.terminate()
                agent.wait(20)
                assert eventually(lambda: standin["locked_mhz"] == 0)
    report = report_of(config, tmp_path)
    assert report["counts"]["actuator_lost"] == 1
    assert "the actuator must stay reachable" in report["safe_states"][0]["reason"]


def test_nonsense_on_every_socket_unlocks_and_is_survived(
    card: Standin, tmp_path: Path, voice: EngineVoice
) -> None:
    stray: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
    stray.bind(f"ipc://{tmp_path}/events")
    config = with_actuator(
        tmp_path,
        voice,
        event_address=f"ipc://{tmp_path}/events",
        batch_socket=str(tmp_path / "batches"),
    )
    with running(config, tmp_path) as process:
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: card["locked_mhz"] == 1005)
        before = card["num_resets"]
        for payload in (b"", b"\xff" * 300, b"\x93\x01\x02\x03", os.urandom(70_000)):
            voice.raw(payload)
            stray.send_multipart((b"decode/0/", payload))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(payload[:1000], str(tmp_path / "batches"))
        assert eventually(lambda: card["num_resets"] > before)
        with repeating(lambda: voice.decode(*SMALL)):
            assert eventually(lambda: card["locked_mhz"] == 1005)
        assert process.poll() is None
    stray.close(linger=0)
    assert report_of(config, tmp_path)["counts"]["wrong_messages"] == 12


def test_dry_run_decides_as_the_simulators_controller_does(
    tmp_path: Path, voice: EngineVoice
) -> None:
    """Each record is shown to the agent's process and to a controller of our own: same clocks.

    A record that moves the clock is followed by the next when the agent has told of the decision,
    so that none waits behind another, whose clock would be left out. No clock counts as set.
    """
    batches = [(1 + 37 * i % 500, 400 * (1 + 37 * i % 500) + 11 * i) for i in range(300)]
    config = config_of(
        tmp_path,
        voice,
        settings=SETTINGS | {"controller": "ecofreq:frequencies=705+1005+1200+1410"},
        report_address=f"ipc://{tmp_path}/reports",
    )
    settings = make_config(config.settings)
    source = PolicySource(config=settings, profile=load_profile(settings.profile))
    controller = source.make_controller("decode", 0)
    state = source.make_tracker("decode", 0).state
    expected = [controller.initial_clock_mhz()]
    for state.last_batch_size, state.last_tokens in batches:
        expected.append(controller.decide(state))
    assert len(set(expected)) == 4

    async def play() -> None:
        feed = ReportFeed(f"ipc://{tmp_path}/reports")
        try:
            changes = zip(batches, expected, expected[1:], strict=False)
            for number, (load, before, after) in enumerate(changes, 1):
                voice.decode(*load)
                while before != after and (await feed.receive()).decisions < number:
                    pass
            while (await feed.receive()).decisions < len(batches):
                pass
        finally:
            feed.close()

    with running(config, tmp_path):
        wait_until_heard(voice)
        asyncio.run(asyncio.wait_for(play(), 60))
    found = [line["clock_mhz"] for line in lines_of(tmp_path / "agent-decode-0.decisions.jsonl")]
    changes = [b for a, b in pairwise([0, *expected]) if a != b]
    assert found == [*changes, 0]
    assert (tmp_path / "agent-decode-0.clocks.jsonl").read_text() == ""
    report = report_of(config, tmp_path)
    assert report["counts"]["decisions"] == len(batches)


def num_unread_bytes(descriptor: int) -> int:
    """Of what was sent on a Unix datagram socket; Linux tells the sender."""
    found = bytearray(4)
    fcntl.ioctl(descriptor, termios.TIOCOUTQ, found)
    return int.from_bytes(found, sys.byteorder)


def wait_until_heard(voice: EngineVoice) -> None:
    """A subscription takes a moment; the heartbeats that it misses meanwhile say nothing."""
    for _ in range(30):
        voice.say()
        time.sleep(0.01)


def test_prefill_decides_on_the_plug_ins_word_with_the_routers_queue(
    tmp_path: Path,
    voice: EngineVoice,
    plugin: Any,  # noqa: ANN401, F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EcoFreq in prefill: one request of 300 tokens fits at 1005 MHz; when another waits, 1410."""
    monkeypatch.setattr(plugin, "speaks_for_all", lambda: True)  # SGLang is not in this process
    events = EventPublisher(f"ipc://{tmp_path}/events")
    config = config_of(
        tmp_path,
        voice,
        phase="prefill",
        event_address=f"ipc://{tmp_path}/events",
        batch_socket=str(tmp_path / "batches"),
    )
    with running(config, tmp_path):
        announcer = plugin.Announcer(str(tmp_path / "batches"))
        scheduler = type("Scheduler", (), {"waiting_queue": []})()
        record = tmp_path / "agent-prefill-0.decisions.jsonl"
        one = batch("extend", batch_size=lambda: 1, extend_num_tokens=300)
        time.sleep(0.3)  # the event subscription
        events.publish(Event("assigned", "prefill", 0, now_s(config), 1, 300))
        time.sleep(0.2)
        announcer.announce(scheduler, one)
        assert eventually(lambda: num_unread_bytes(announcer.fileno()) == 0)
        assert [x["clock_mhz"] for x in lines_of(record)] == [1005]
        voice.say(num_prefill_requests=1, sum_prefill_tokens=300)
        for request_id in (2, 3):
            events.publish(Event("assigned", "prefill", 0, now_s(config), request_id, 300))
        time.sleep(0.2)
        announcer.announce(scheduler, one)
        assert eventually(lambda: [x["clock_mhz"] for x in lines_of(record)] == [1005, 1410])
        announcer.close()
    events.close()
    report = report_of(config, tmp_path)
    assert report["counts"]["notices"] == 3  # the hello and two batches
    assert report["counts"]["decisions"] == report["notice_latency"]["num"] == 2


def now_s(config: AgentConfig) -> float:
    return (time.monotonic_ns() - config.start_ns) * 1e-9
