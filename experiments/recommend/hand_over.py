"""Lines and files that put the advice into use.

GPUs are numbered from 0, prefill instances first. A clock is locked by `nvidia-smi -lgc`; where
locks are not allowed, `-pl` sets the power cap that was searched, or, where none was, what the card
draws at most at that clock, which is a ceiling and slows nothing that the lock would not. Dynamo's
power agent sets the same from a pod's annotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w

from voltana.experiments.recommend.advice import DYNAMIC, FIXED, Advice, Judged, top_clock_mhz
from voltana.experiments.recommend.choose.desk import PHASES, fixed_cap_w, fixed_clock_mhz
from voltana.profiles.common.files import write_text
from voltana.sim.config import SimConfig, make_config

ANNOTATION: Final = "dynamo.nvidia.com/gpu-power-limit"
"""Of a worker's pod, in W for each of its GPUs: read by Dynamo's power agent."""
PRODUCT: Final = "nvidia.com/gpu.product"
"""Label of a node, by GPU feature discovery."""
GPU_RESOURCE: Final = "nvidia.com/gpu"
FIRST_PORT: Final = 30_000
BOOTSTRAP_PORT: Final = 8_998
_CAP_STEP_W: Final = 5
_NOT_REPLAYED: Final = (
    "seed", "duration_s", "rate_rps", "workload", "trace", "trace_start_s", "trace_unit",
    "trace_drop_failed", "trace_sample_frac", "arrivals", "time_scale", "num_prefill", "num_decode",
)  # fmt: skip
"""Configuration keys of requests, not of the fleet and its policy."""
_OF_REQUESTS: Final = ("workload", "trace", "rate_rps", "arrivals", "duration_s")
ENGINE_PYTHON: Final = ".engine-gpu/bin/python"
"""Where `make replay-gpu` installs SGLang."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """The instances of a phase."""

    phase: str
    gpus: tuple[tuple[int, ...], ...]
    """Of each instance."""
    clock_mhz: int | None
    """Fixed; None if a policy chooses."""
    cap_w: int
    """Of a GPU: the one that is set, else what it draws at most at its clock (a policy: at its top
    one), rounded up."""


def roles(advice: Advice, way: Judged) -> tuple[Role, Role]:
    """Prefill and decode as the way has them."""
    question = advice.question
    width = question.tensor_parallel
    found, first = [], 0
    for phase, count in zip(PHASES, way.counts, strict=True):
        gpus = tuple(tuple(range(first + i * width, first + (i + 1) * width)) for i in range(count))
        first += count * width
        clock = fixed_clock_mhz(way.settings, phase)
        at_mhz = clock or top_clock_mhz(advice, way)
        cap_w = math.ceil(question.peak_w(phase, at_mhz) / width / _CAP_STEP_W) * _CAP_STEP_W
        set_w = fixed_cap_w(way.settings, phase)
        cap_w = cap_w if set_w is None else math.ceil(set_w / width)
        limit_w = question.profile.meta.gpu.power_limit_w
        found.append(Role(phase=phase, gpus=gpus, clock_mhz=clock, cap_w=min(cap_w, int(limit_w))))
    return found[0], found[1]


def _capped(advice: Advice, way: Judged) -> tuple[Role, Role]:
    """The roles whose caps are set: in place of fixed clocks the power caps, if searched."""
    return roles(advice, advice.caps if way.name == FIXED and advice.caps is not None else way)


def gpu_lines(advice: Advice, way: Judged) -> list[str]:
    """`nvidia-smi` lines; for a policy those of its helper."""
    lines = []
    searched = way.name == FIXED and advice.caps is not None
    for role, cap in zip(roles(advice, way), _capped(advice, way), strict=True):
        if way.name == DYNAMIC:
            continue
        cards = ",".join(str(g) for instance in role.gpus for g in instance)
        why = role.phase
        if role.clock_mhz is not None:
            lines.append(
                f"sudo nvidia-smi -i {cards} -lgc {role.clock_mhz},{role.clock_mhz}"
                f"  # {role.phase}; back: -rgc"
            )
            what = "'s cap" if searched else "'s most at that clock"
            why = f"or, where locks are not allowed: {role.phase}{what}"
        lines.append(f"sudo nvidia-smi -i {cards} -pl {cap.cap_w}  # {why}")
    if way.name == DYNAMIC:
        cards = " ".join(f"--gpu {g}" for r in roles(advice, way) for i in r.gpus for g in i)
        lines.append(f"sudo voltana actuator /run/voltana.sock {cards}")
        lines.append("voltana replay --config replay.toml --out results/replayed  # agents, clocks")
    lines.append("voltana router --config router.toml --port 8000")
    return lines


def dynamo_yaml(advice: Advice, way: Judged) -> str:
    """Annotations of Dynamo's prefill and decode workers, as its power agent reads them.

    Source: ai-dynamo/dynamo, examples/power-aware-budget.
    """
    parts = [
        f"    - name: {role.phase}\n"
        f"      type: {role.phase}\n"
        f"      replicas: {len(role.gpus)}\n"
        "      podTemplate:\n"
        "        metadata:\n"
        "          annotations:\n"
        f'            {ANNOTATION}: "{role.cap_w}"\n'
        "        spec:\n"
        "          nodeSelector: # the label of your nodes; Dynamo asks for it beside a limit\n"
        f"            {PRODUCT}: {advice.question.profile.meta.gpu.name.replace(' ', '-')}\n"
        "          containers:\n"
        "            - name: main\n"
        "              resources:\n"
        "                limits:\n"
        f'                {GPU_RESOURCE}: "{len(role.gpus[0])}"\n'
        for role in _capped(advice, way)
    ]
    head = "apiVersion: nvidia.com/v1beta1\nkind: DynamoGraphDeployment # merge this into yours\n"
    return f"{head}spec:\n  components:\n" + "".join(parts)


def sglang_lines(advice: Advice, way: Judged) -> list[str]:
    """What starts each server, its cards, limits and forward-pass metrics."""
    model = advice.question.profile.meta.model
    limits = _limits(advice)
    lines = []
    for role in roles(advice, way):
        for i, gpus in enumerate(role.gpus):
            name = f"{role.phase}-{i}"
            words = [
                f"CUDA_VISIBLE_DEVICES={','.join(map(str, gpus))}",
                f"python -m sglang.launch_server --model-path {model.name}",
                f"--tp-size {len(gpus)} --disaggregation-mode {role.phase}",
                f"--port {_port(role.phase, i)}",
            ]
            if role.phase == "prefill":
                words.append(f"--disaggregation-bootstrap-port {BOOTSTRAP_PORT + i}")
            words += [
                limits[role.phase],
                f"--enable-forward-pass-metrics --forward-pass-metrics-worker-id {name}",
                f"--forward-pass-metrics-ipc-name ipc:///run/voltana/{name}",
            ]
            lines.append(" ".join(words))
    return lines


def _port(phase: str, instance: int) -> int:
    return FIRST_PORT + (100 if phase == "decode" else 0) + instance


def router_toml(advice: Advice, way: Judged) -> str:
    """The configuration of `voltana router`, in front of the servers of `sglang_lines`."""
    fleet = {
        role.phase: [_worker(role, i) for i in range(len(role.gpus))] for role in roles(advice, way)
    }
    return tomli_w.dumps({"simulate": _simulate(advice, way), "fleet": fleet})


def replay_toml(advice: Advice, way: Judged) -> str:
    """The configuration of `voltana replay`: servers, agents that set clocks, router, requests."""
    question = advice.question
    asked = make_config(question.base).as_dict()
    told = _simulate(advice, way) | {k: asked[k] for k in _OF_REQUESTS if k in asked}
    told |= {"num_prefill": way.counts[0], "num_decode": way.counts[1]}
    pair = roles(advice, way)
    fleet = {
        "python": ENGINE_PYTHON,
        "model": question.profile.meta.model.name,
        "arguments": " ".join(_limits(advice).values()),
    }
    replay = {
        "gpus": {role.phase: [list(g) for g in role.gpus] for role in pair},
        "actuator": "/run/voltana.sock",
    }
    return tomli_w.dumps({"simulate": told, "fleet": fleet, "replay": replay})


def _simulate(advice: Advice, way: Judged) -> dict[str, Any]:
    """Keys of the policy and its promises that are not their defaults."""
    config = make_config({**advice.question.base, **way.settings})
    plain = SimConfig().as_dict()
    always = ("profile", "slo_ttft_s", "slo_itl_s", "router")
    told = {
        k: v for k, v in config.as_dict().items()
        if k not in _NOT_REPLAYED and (k in always or plain.get(k) != v)
    }  # fmt: skip
    if way.name != DYNAMIC:
        told.pop("controller", None)
    # as SGLang serves: decode repeats prefill's token
    return told | {"first_token": "prefill"}


def _limits(advice: Advice) -> dict[str, str]:
    """SGLang's arguments that bound batches as the simulation does, by phase."""
    engine = advice.question.profile.meta.engine
    config = make_config(advice.question.base)
    running = config.max_running_requests or engine.max_running_requests
    chunk = config.max_prefill_tokens or engine.max_prefill_tokens
    return {
        "prefill": f"--max-prefill-tokens {chunk} --chunked-prefill-size {chunk}",
        "decode": f"--max-running-requests {running}",
    }


def _worker(role: Role, instance: int) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "url": f"http://127.0.0.1:{_port(role.phase, instance)}",
        "metrics": f"ipc:///run/voltana/{role.phase}-{instance}.0",
    }
    if role.phase == "prefill":
        found["bootstrap_port"] = BOOTSTRAP_PORT + instance
    return found


def write_ready(advice: Advice, folder: Path) -> list[Path]:
    """Write gpus.sh, sglang.sh, dynamo.yaml, router.toml and replay.toml of the advised way."""
    way = advice.best
    head = f"# {way.setting}\n"
    files = {
        "gpus.sh": head + "\n".join(gpu_lines(advice, way)) + "\n",
        "sglang.sh": head + "\n".join(f"{line} &" for line in sglang_lines(advice, way)) + "\n",
        "dynamo.yaml": head + dynamo_yaml(advice, way),
        "router.toml": head + router_toml(advice, way),
        "replay.toml": head + replay_toml(advice, way),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(text, folder / name)
    return [folder / name for name in files]
