"""What a SGLang server is started with: command line and environment, by its role and purpose."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import numpy as np

from voltana.hwreplay.messages.batch_feed import ENVIRONMENT as BATCH_SOCKET
from voltana.hwreplay.router.servers.vocabulary import read_vocab_size
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import cuda_environment
from voltana.sim.policies.base import COLOCATED, DECODE, PREFILL, Phase

HOST: Final = "127.0.0.1"
LENT_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, LAST_PORT = 10_000, 65_535
CPU_ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
}
CPU_ARGUMENTS: Final = (
    *("--skip-tokenizer-init", "--device", "cpu", "--attention-backend", "torch_native"),
    *("--dtype", "bfloat16", "--max-running-requests", "16", "--mem-fraction-static", "0.1"),
    "--sleep-on-idle",
)
"""What a server on a CPU needs. Without --sleep-on-idle idle schedulers spin on the same cores."""
MIXED_ARGUMENT: Final = "--enable-mixed-chunk"
"""A chunk of prompts runs beside decoding; without it decoding stands meanwhile."""
PAIR_ARGUMENTS: Final = ("--disaggregation-transfer-backend", "mooncake")
PAIR_ENVIRONMENT: Final = {
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "10",
}
"""One transfer that fails bars a decode server until a probe reaches it: after 30 s unless told."""
CPU_DECODE_ARGUMENTS: Final = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
"""Without a backup on the host, a decode server without a GPU dies at start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A Python with SGLang and the model that it serves."""

    python: Path
    """Of the environment that SGLang is installed in."""
    model: Path
    """Folder with the model, or with its config.json alone for `--load-format dummy`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of every server; the last word where one is given twice."""
    arguments_of: Callable[[ServerPlan], Sequence[str]] | None = field(
        default=None, compare=False, repr=False
    )
    """What a server is given before those, by its role."""
    environment_of: Callable[[ServerPlan], Mapping[str, str]] | None = field(
        default=None, compare=False, repr=False
    )
    """What a server's environment has besides, e.g. the emulated card that it stands on."""

    @classmethod
    def in_folder(cls, directory: Path) -> Self:
        """What `make engine` fills: `venv/` and `model/`."""
        return cls(python=directory / "venv/bin/python", model=directory / "model")

    def check(self, named_by: str = "[fleet]") -> None:
        """Refuse one that is not there; `named_by` is the option or table that names it.

        Raises:
            VoltanaError: No such Python.
        """
        if shutil.which(self.python) is None:
            raise VoltanaError(
                f"{named_by} must name a Python with SGLang, got {self.python}: on a CPU run `make "
                "engine`, with GPUs `make replay-gpu` installs one"
            )

    def vocab_size(self) -> int:
        """Number of token ids that the model has.

        Raises:
            VoltanaError: Its config.json cannot be read, or does not say.
        """
        found = read_vocab_size(self.model)
        if found is None:
            raise VoltanaError(
                "a model must be a folder whose config.json has its vocab_size, got "
                f"{self.model}: name one in [fleet] model"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """Arguments by what the servers are started for."""

    always: tuple[str, ...]
    on_cpu: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()
    announces_batches: bool
    """An agent hears what its plug-in says before each batch."""


REPLAY: Final = Purpose(
    # Each event of a stream holds its new tokens alone: without it a long answer costs the
    # servers more with every token, on the cores that they compute on.
    always=("--incremental-streaming-output",),
    on_cpu=("--max-total-tokens", "8192"),
    announces_batches=True,
)
PROFILE: Final = Purpose(
    always=("--disable-radix-cache", "--skip-tokenizer-init"),
    # Far more than a point needs: the reserve for each request shall not keep a batch small.
    on_cpu=("--max-total-tokens", "65536"),
    # As many tokens as the longest prompt of the grid: the engine's own chunk of 2,048 to 8,192
    # would split it into several passes.
    on_gpu=("--chunked-prefill-size", "16384"),
    announces_batches=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """One server to start."""

    phase: Phase
    """What it does; a colocated one both."""
    instance_id: int = 0
    port: int
    bootstrap_port: int | None = None
    """Where decode servers ask a prefill server for its KV; None for any other."""
    gpus: tuple[int, ...] = ()
    """Its cards, as NVML numbers them; none: the CPU."""
    sockets: Path | None = None
    """Folder for its metrics and batch notices, its path short (a socket's may have 107 bytes);
    None publishes neither."""
    purpose: Purpose = REPLAY

    @property
    def name(self) -> str:
        """Stem of its log and sockets, e.g. decode-0."""
        return f"{self.phase}-{self.instance_id}"

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{HOST}:{self.port}"

    @property
    def metrics(self) -> str | None:
        """ZMQ address of its forward-pass metrics; the engine adds its data-parallel rank."""
        return None if self.sockets is None else f"ipc://{self.sockets / self.name}.0"

    @property
    def batch_socket(self) -> Path | None:
        """Where its plug-in announces batches."""
        if self.sockets is None or not self.purpose.announces_batches:
            return None
        return self.sockets / f"{self.name}.batch"

    def command(self, installation: Installation) -> tuple[str, ...]:
        """What starts it; on GPUs its tensor parallelism is as wide as its cards.

        Example:
            >>> plan = ServerPlan(phase="decode", port=1, gpus=(2, 3))
            >>> command = plan.command(Installation(python=Path("p"), model=Path("m")))
            >>> "--tp-size 2" in " ".join(command)
            True
        """
        found = ["--model-path", str(installation.model), "--host", HOST, "--port", str(self.port)]
        if self.phase != COLOCATED:
            found += ["--disaggregation-mode", self.phase, *PAIR_ARGUMENTS]
        found += self.purpose.always
        if self.bootstrap_port is not None:
            found += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)]
        if self.gpus:
            found += [*self.purpose.on_gpu, "--tp-size", str(len(self.gpus))]
        else:
            found += [*CPU_ARGUMENTS, *self.purpose.on_cpu]
            found += CPU_DECODE_ARGUMENTS if self.phase == DECODE else ()
        if self.sockets is not None:
            found += ["--enable-forward-pass-metrics"]
            found += ["--forward-pass-metrics-worker-id", self.name]
            found += ["--forward-pass-metrics-ipc-name", f"ipc://{self.sockets / self.name}"]
        if installation.arguments_of is not None:
            found += installation.arguments_of(self)
        return (
            *(str(installation.python), "-m", "sglang.launch_server"),
            *(*found, *installation.arguments),
        )

    def environment(self) -> dict[str, str]:
        """Variables added to our environment; the KV transfer's sockets stay on loopback."""
        found = cuda_environment(self.gpus) if self.gpus else dict(CPU_ENVIRONMENT)
        if self.phase != COLOCATED:
            found |= PAIR_ENVIRONMENT
        found["SGLANG_HOST_IP"] = HOST
        if self.batch_socket is not None:
            found[BATCH_SOCKET] = str(self.batch_socket)
        return found


def plan_server(
    phase: Phase,
    instance_id: int = 0,
    *,
    gpus: Sequence[int] = (),
    sockets: Path | None = None,
    purpose: Purpose = REPLAY,
) -> ServerPlan:
    """A plan with ports of the loopback that nobody had a moment ago.

    Args:
        phase: What it does.
        instance_id: Its number within its phase.
        gpus: Its cards; none: the CPU.
        sockets: As in `ServerPlan`.
        purpose: What it is for.
    """
    return ServerPlan(
        phase=phase,
        instance_id=instance_id,
        port=_free_port(),
        bootstrap_port=_free_port() if phase == PREFILL else None,
        gpus=tuple(gpus),
        sockets=sockets,
        purpose=purpose,
    )


def _free_port() -> int:
    """A port that nobody has, of those that the kernel never lends.

    A server asks for its port when it has loaded everything, a minute from now: until then the
    kernel may give one of its own range to any connection, and SGLang stays up without HTTP.
    """
    first, last = map(int, LENT_PORTS.read_text().split())
    ports = np.arange(FIRST_PORT, LAST_PORT + 1)
    own = ports[(ports < first) | (ports > last)]
    for port in np.random.default_rng().permutation(own).tolist():
        if _can_bind(port):
            return int(port)
    raise VoltanaError(f"a server needs a free port outside {first} to {last}: there is none")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
