"""The command lines and environments of servers, without starting any."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.conftest import ROOT
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.engines.launch import run_fleet, run_profiled
from voltana.hwreplay.engines.plan import Installation, ServerPlan, plan_server
from voltana.hwreplay.replay.config import ReplayConfig, read_replay_config
from voltana.hwreplay.replay.parts import Run, router
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.policies.base import Phase

INSTALLED = Installation(
    python=Path("/opt/sglang/bin/python"),
    model=Path("models/llama"),
    arguments=("--load-format", "dummy", "--port", "7"),
)


def plan(phase: Phase, gpus: tuple[int, ...] = ()) -> ServerPlan:
    bootstrap_port = 9000 if phase == "prefill" else None
    return ServerPlan(
        phase=phase, instance_id=1, port=8000, bootstrap_port=bootstrap_port, gpus=gpus,
        sockets=Path("/tmp/v"),
    )  # fmt: skip


def test_a_gpu_server_by_hand() -> None:
    """Two cards are a tensor parallelism of two; nothing of the CPU's; the user's word is last."""
    at = plan("prefill", (2, 5))
    assert " ".join(at.command(INSTALLED)) == (
        "/opt/sglang/bin/python -m sglang.launch_server --model-path models/llama"
        " --host 127.0.0.1 --port 8000 --disaggregation-mode prefill"
        " --disaggregation-transfer-backend mooncake --incremental-streaming-output"
        " --disaggregation-bootstrap-port 9000 --tp-size 2 --enable-forward-pass-metrics"
        " --forward-pass-metrics-worker-id prefill-1"
        " --forward-pass-metrics-ipc-name ipc:///tmp/v/prefill-1"
        " --load-format dummy --port 7"
    )
    assert at.environment() == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "2,5",
        "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
        "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "10",
        "SGLANG_HOST_IP": "127.0.0.1",
        "VOLTANA_BATCH_SOCKET": "/tmp/v/prefill-1.batch",
    }
    decode = plan("decode", (0,)).command(INSTALLED)
    assert "--disaggregation-bootstrap-port" not in decode
    assert "--disaggregation-decode-retraction-backup" not in decode
    assert decode[decode.index("--tp-size") + 1] == "1"


def test_a_cpu_server_has_what_a_cpu_needs_and_no_cards() -> None:
    at = plan("decode")
    command = " ".join(at.command(INSTALLED))
    for words in ("--device cpu", "--max-total-tokens 8192", "--sleep-on-idle", "cpu_tensor"):
        assert words in command
    assert "--tp-size" not in command
    found = at.environment()
    assert found["SGLANG_USE_CPU_ENGINE"] == "1"
    assert not any(key.startswith("CUDA") for key in found)


def test_without_an_installation_the_remedy_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(VoltanaError, match=r"must name a Python with SGLang, .* `make engine`"),
        run_fleet(Installation.in_folder(tmp_path), tmp_path),
    ):
        pass
    with (
        pytest.raises(VoltanaError, match=r"--server-python must name a Python .* `make engine`"),
        run_profiled(Installation.in_folder(tmp_path), tmp_path / "logs", is_pair=True),
    ):
        pass


def test_the_fleet_table_names_what_to_start(tmp_path: Path) -> None:
    path = tmp_path / "replay.toml"
    fleet = {"engine": "e", "model": "m", "arguments": "--load-format dummy --dtype 'half'"}
    path.write_text(tomli_w.dumps({"fleet": fleet, "replay": {"power_w": 1.0}}))
    assert read_replay_config(path).engine == Installation(
        python=Path("e/venv/bin/python"),
        model=Path("m"),
        arguments=("--load-format", "dummy", "--dtype", "half"),
    )
    path.write_text(tomli_w.dumps({"fleet": {"python": "p"}, "replay": {"power_w": 1.0}}))
    with pytest.raises(VoltanaError, match="must name both python and model, or engine"):
        read_replay_config(path)


def test_token_ids_must_be_the_models(tmp_path: Path) -> None:
    """The engine's own model has 512: the default range ends there, another may not go beyond."""
    path = tmp_path / "replay.toml"
    fleet = {"python": sys.executable, "model": str(tmp_path)}
    whole: dict[str, Any] = {"fleet": fleet, "replay": {"power_w": 1.0}}
    path.write_text(tomli_w.dumps(whole))
    with pytest.raises(VoltanaError, match=r"config.json has its vocab_size, got"):
        read_replay_config(path).vocab_size()
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    assert read_replay_config(path).vocab_size() == 512
    whole["replay"]["vocabulary"] = [3, 513]
    path.write_text(tomli_w.dumps(whole))
    with pytest.raises(VoltanaError, match=r"within the model's 512 token ids, got \[3, 513\]"):
        read_replay_config(path).vocab_size()
    running = [{"url": "http://h:1", "metrics": "ipc:///tmp/m"}]
    whole["fleet"] = {"prefill": running, "decode": running}
    whole["simulate"] = {"prefill_metrics": "after"}
    path.write_text(tomli_w.dumps(whole))
    assert read_replay_config(path).vocab_size() is None  # nobody says
    whole["router"] = {"vocab_size": 512}
    path.write_text(tomli_w.dumps(whole))
    with pytest.raises(VoltanaError, match="within the model's 512"):
        read_replay_config(path).vocab_size()


def test_the_router_is_told_what_the_model_has(tmp_path: Path) -> None:
    """Its file is there as soon as it starts."""
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    config = ReplayConfig(
        sim=make_config({}),
        engine=Installation(python=Path(sys.executable), model=tmp_path),
        power_w=1.0,
    )
    run = Run(
        config=config,
        directory=tmp_path,
        sockets=tmp_path,
        clock=RunClock(),
        workers=(),
        batch_sockets={},
        vocab_size=config.vocab_size(),
        has_fleet_view=False,
    )

    async def start() -> None:
        async with router(run):
            pass

    with pytest.raises(VoltanaError):  # it has no workers
        asyncio.run(start())
    told = tomllib.loads((tmp_path / "router.toml").read_text())
    assert told["router"]["vocab_size"] == 512


def test_servers_on_gpus_keep_to_this_machine() -> None:
    """SGLang binds the KV transfer's sockets where SGLANG_HOST_IP says, else to a LAN address."""
    for gpus in ((), (2, 3)):
        at = ServerPlan(phase="prefill", port=1, bootstrap_port=2, gpus=gpus)
        assert at.environment()["SGLANG_HOST_IP"] == "127.0.0.1"


def test_no_connection_can_take_a_port_before_its_server_asks_for_it() -> None:
    """What the kernel lends to connections is out of bounds: a server starts a minute later."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    plans = [plan_server("prefill", i) for i in range(20)]
    ports = {port for p in plans for port in (p.port, p.bootstrap_port or 0)}
    assert len(ports) == 40
    assert not any(first <= port <= last for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", plans[0].port))


def test_the_gpu_environment_is_checked_as_a_server_uses_it(tmp_path: Path) -> None:
    """`import mooncake` passes where its engine cannot be loaded; then the pinned one is installed,
    and a second failure ends the command."""
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = -m ]\n')
    ldconfig = tmp_path / "ldconfig"
    names = "libibverbs.so.1 libmlx5.so.1 librdmacm.so.1 libnuma.so.1"
    ldconfig.write_text("#!/bin/sh\nprintf '%s (libc6)\\n' " + names + "\n")
    script = (ROOT / "hwreplay/engines/sglang/install-gpu.sh").read_text()
    script = script.replace("/sbin/ldconfig", str(ldconfig))
    for path in (python, ldconfig):
        path.chmod(0o755)
    whole = tmp_path / "install-gpu.sh"
    whole.write_text(script)
    done = subprocess.run(["/bin/sh", str(whole), str(tmp_path / "env")], check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode != 0
    assert len(calls) == 3
    assert "mooncake.engine" in calls[0]
    assert "mooncake-transfer-engine-cuda13==" in calls[1]
    assert calls[2] == calls[0]
    ldconfig.write_text("#!/bin/sh\nprintf 'libibverbs.so.1 (libc6)\\n'\n")
    told = subprocess.run(
        ["/bin/sh", str(whole), str(tmp_path / "env")], check=False, capture_output=True, text=True
    )
    assert told.returncode == 1
    assert "libmlx5.so.1" in told.stderr
    assert "libibverbs.so.1 " not in told.stderr


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"gpus": {"prefill": [[0]], "decode": [[0]]}}, "name each card once, got \\[0\\]"),
        ({"gpus": {"prefill": [[0, 1]], "decode": [[2, 1]]}}, "name each card once, got \\[1\\]"),
        ({"gpus": {"prefill": [[0, 0]], "decode": [[1]]}}, "name each card once, got \\[0\\]"),
        ({"arguments": "--dp-size 2"}, "must not have --dp-size"),
        ({"arguments": "--dp=2"}, "must not have --dp=2"),
    ],
)
def test_what_would_be_metered_or_watched_wrongly_is_refused(
    tmp_path: Path, table: dict[str, Any], said: str
) -> None:
    fleet = {"python": "p", "model": "m", "arguments": table.pop("arguments", "")}
    own = {"gpus": {"prefill": [[0]], "decode": [[1]]}} | table
    path = tmp_path / "replay.toml"
    whole = {"simulate": {"num_prefill": 1, "num_decode": 1, "prefill_metrics": "after"}}
    path.write_text(tomli_w.dumps({**whole, "fleet": fleet, "replay": own}))
    with pytest.raises(VoltanaError, match=said):
        read_replay_config(path)


def test_the_gpu_example_is_a_configuration() -> None:
    config = read_replay_config(ROOT / "hwreplay/replay-gpu.toml")
    assert config.engine is not None
    assert config.actuator is None  # no clock is touched
    assert config.power_w is None
    assert config.gpus_of("prefill", 0) == (0,)
    engine = Installation(python=config.engine.python, model=ROOT / config.engine.model)
    assert engine.vocab_size() == 128256
