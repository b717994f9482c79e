"""Latency of the controller agents: a message of the engine in, a clock out.

python benchmarks/agent_loop.py [--instances N] [--rate R] [--seconds S]

Everything is real but the engine and the card, which is emulated: per instance an agent process,
a ZMQ socket with SGLang's records at a steady rate, and for prefill the plug-in's datagrams; one
actuator process that records instead of locking, and a router that has nothing to say. The
batches alternate so that every decision changes the clock. Two times are measured: inside the
agent, from taking a message off its socket to the decision in the kernel; and over all, from this
program's sending to the actuator's acting, both hops included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import numpy as np
import zmq

from voltana.hwreplay.agent.agent import AgentConfig, await_agents, start_agents
from voltana.hwreplay.emulated.build import build_library, show_here
from voltana.hwreplay.emulated.state import create_cards
from voltana.sim.policies.base import DECODE, PREFILL, Phase

ROOT: Final = Path(__file__).resolve().parents[1]
PLUGIN: Final = ROOT / "hwreplay/engines/sglang/observer/voltana_engine_observer.py"
BATCHES: Final[dict[Phase, tuple[tuple[int, int], tuple[int, int]]]] = {
    PREFILL: ((1, 300), (8, 16_000)),
    DECODE: ((8, 8_000), (400, 400_000)),
}
"""(requests, tokens) that fit the lower level of EcoFreq and that do not, on the A100 profile."""
PROFILE: Final = "a100-80g-sxm/llama-3.1-8b"
SETTINGS: Final = {"controller": "ecofreq", "router": "round-robin"}
EVENTS: Final = "events"
GOAL_P99_S: Final = 0.004


class Instance:
    """One engine's voice and its agent."""

    def __init__(
        self, phase: Phase, number: int, gpu: int, directory: Path, actuator: Path
    ) -> None:
        self.phase: Phase = phase
        self.gpu = gpu
        self.sent_s: list[float] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = self._context.socket(zmq.PUB)
        address = f"ipc://{directory}/{phase}-{number}.metrics"
        self._socket.bind(address)
        self._sequence = 0
        self.config = AgentConfig(
            phase=phase,
            instance_id=number,
            start_ns=time.monotonic_ns(),
            settings=SETTINGS,
            metrics_address=address,
            event_address=f"ipc://{directory}/{EVENTS}",
            batch_socket=str(directory / f"{phase}-{number}.batches") if phase == PREFILL else None,
            actuator_socket=str(actuator),
            gpus=(gpu,),
        )
        self.process = start_agents([self.config], directory)
        self._announcer = _announcer(self.config.batch_socket)
        self._scheduler = SimpleNamespace(waiting_queue=[])

    def say(self, num_requests: int, tokens: int) -> None:
        """One iteration: a record, and before it in prefill the plug-in's notice."""
        self.sent_s.append(time.monotonic_ns() * 1e-9)
        if self.phase == PREFILL:
            self._announcer.announce(self._scheduler, _batch(num_requests, tokens))
            scheduled = {"num_prefill_requests": num_requests, "sum_prefill_tokens": tokens}
        else:
            scheduled = {"num_decode_requests": num_requests, "sum_decode_kv_tokens": tokens}
        self.record(scheduled)

    def record(self, scheduled: dict[str, int]) -> None:
        """One record; with nothing scheduled a heartbeat."""
        message: dict[str, Any] = {
            "version": 1,
            "worker_id": self.config.name,
            "dp_rank": 0,
            "counter_id": self._sequence,
            "wall_time": 0.01,
            "scheduled_requests": scheduled,
            "queued_requests": {},
        }
        payload = msgspec.msgpack.encode(message)
        self._socket.send_multipart((b"", self._sequence.to_bytes(8, "big"), payload))
        self._sequence += 1


def _announcer(path: str | None) -> Any:  # noqa: ANN401 (the plug-in lives in the engine's world)
    spec = importlib.util.spec_from_file_location("observer", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return None if path is None else module.Announcer(path)


def _batch(num_requests: int, tokens: int) -> SimpleNamespace:
    mode = SimpleNamespace(is_extend=lambda: True, is_idle=lambda: False, is_prebuilt=lambda: False)
    return SimpleNamespace(
        forward_mode=mode, batch_size=lambda: num_requests, extend_num_tokens=tokens
    )


def main() -> None:
    """Run and print one line an instance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=4, help="half prefill, half decode")
    parser.add_argument("--rate", type=float, default=50.0, help="iterations per s and instance")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), options.instances, options.rate, options.seconds)


def run(directory: Path, num_instances: int, rate_per_s: float, seconds: float) -> None:
    """Start everything, play the records, end everything, print."""
    build_library(directory)
    show_here(directory, create_cards(directory / "cards", PROFILE, num_instances, directory))
    actuator_path, actions = directory / "actuator", directory / "actions.jsonl"
    gpus = [argument for gpu in range(num_instances) for argument in ("--gpu", str(gpu))]
    actuator = subprocess.Popen(
        [sys.executable, "-m", "voltana.experiments.cli", "actuator", str(actuator_path), *gpus,
         "--dry-run", str(actions)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    instances: list[Instance] = []
    router = zmq.Context.instance().socket(zmq.PUB)
    router.bind(f"ipc://{directory}/{EVENTS}")
    try:
        assert actuator.stderr is not None
        actuator.stderr.readline()
        for gpu in range(num_instances):
            phase: Phase = PREFILL if gpu % 2 == 0 else DECODE
            instances.append(Instance(phase, gpu // 2, gpu, directory, actuator_path))
        for instance in instances:
            await_agents(instance.process, [instance.config], directory)
        play(instances, rate_per_s, seconds)
    finally:
        for instance in instances:
            instance.process.terminate()
            instance.process.wait()
        router.close()
        actuator.send_signal(signal.SIGTERM)
        actuator.wait()
    acted = [json.loads(line) for line in actions.read_text().splitlines()]
    print(f"{num_instances} agents, {rate_per_s:g} iterations/s each, {seconds:g} s")
    for instance in instances:
        report_on(instance, directory, acted)


def play(instances: list[Instance], rate_per_s: float, seconds: float) -> None:
    """Each instance in turn, spread evenly over the period."""
    for _ in range(20):  # the subscriptions settle
        for instance in instances:
            instance.record({})
        time.sleep(0.02)
    start_s = time.monotonic_ns() * 1e-9
    step_s = 1.0 / (rate_per_s * len(instances))
    for turn in range(int(seconds * rate_per_s) * len(instances)):
        time.sleep(max(start_s + turn * step_s - time.monotonic_ns() * 1e-9, 0.0))
        instance = instances[turn % len(instances)]
        instance.say(*BATCHES[instance.phase][turn // len(instances) % 2])
    time.sleep(0.5)


def report_on(instance: Instance, directory: Path, acted: list[dict[str, float]]) -> None:
    """Print an agent's own times and the times over all."""
    report = json.loads((directory / f"{instance.config.name}.report.json").read_text())
    latency = report["loop_latency_written"]
    print(
        f"  {instance.phase:7} {instance.config.instance_id}: in the agent "
        f"p50 {latency['p50_s'] * 1e3:.2f} ms, p99 {latency['p99_s'] * 1e3:.2f} ms, "
        f"max {latency['max_s'] * 1e3:.2f} ms ({latency['num']} decisions); ",
        end="",
    )
    times_s = [a["at_s"] for a in acted if a["gpu"] == instance.gpu and a["clock_mhz"]]
    if len(times_s) != len(instance.sent_s):
        print(
            f"over all not measured: {len(instance.sent_s)} sent, {len(times_s)} acted on, "
            f"safe states {report['safe_states'][:3]}"
        )
        return
    over_all_s = np.asarray(times_s) - np.asarray(instance.sent_s)
    p50_s, p99_s = np.quantile(over_all_s, (0.5, 0.99))
    verdict = "under" if p99_s < GOAL_P99_S else "OVER"
    print(
        f"engine to actuator p50 {p50_s * 1e3:.2f} ms, p99 {p99_s * 1e3:.2f} ms, "
        f"max {over_all_s.max() * 1e3:.2f} ms: {verdict} {GOAL_P99_S * 1e3:g} ms"
    )


if __name__ == "__main__":
    main()
