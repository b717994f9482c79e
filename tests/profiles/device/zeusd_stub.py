"""A daemon with zeusd's documented HTTP API on a Unix socket, over whatever NVML it finds.

By hand: `python -m tests.profiles.device.zeusd_stub SOCK`. What it takes and answers is what the
client of the package `zeus` sends and reads: `ZeusdClient` of zeus 0.16.0 was run, by hand,
against it.
"""

from __future__ import annotations

import json
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pynvml

CLOCKS = ("min_clock_mhz", "max_clock_mhz")
SETTERS = {
    "set_gpu_locked_clocks": (pynvml.nvmlDeviceSetGpuLockedClocks, CLOCKS),
    "reset_gpu_locked_clocks": (pynvml.nvmlDeviceResetGpuLockedClocks, ()),
    "set_power_limit": (pynvml.nvmlDeviceSetPowerManagementLimit, ("power_limit_mw",)),
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    groups: ClassVar[list[str]] = ["gpu-control", "gpu-read"]
    token: ClassVar[str | None] = None

    def do_GET(self) -> None:
        if self.path != "/discover":
            self._answer(404, None)
            return
        gpus = [
            {
                "id": i,
                "name": pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)),
                "pci_address": f"0000:{i:02x}:00.0",
                "cumulative_energy_available": True,
            }
            for i in range(pynvml.nvmlDeviceGetCount())
        ]
        found = {"gpus": gpus, "cpus": [], "enabled_api_groups": self.groups}
        self._answer(200, found | {"auth_required": self.token is not None})

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        words = {key: value[0] for key, value in parse_qs(parts.query).items()}
        setter, names = SETTERS[parts.path.removeprefix("/gpu/")]
        if self.token is not None and self.headers["Authorization"] != f"Bearer {self.token}":
            self._answer(401, {"error": "missing token"})
            return
        assert words.keys() == {"gpu_ids", "block", *names}
        errors, status = {}, 200
        for gpu in words["gpu_ids"].split(","):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
                setter(handle, *(int(words[name]) for name in names))
            except pynvml.NVMLError as error:
                errors[gpu] = str(error)
                denied = error.value == pynvml.NVML_ERROR_NO_PERMISSION
                status = 403 if denied else 500
        self._answer(status, {"errors": errors} if errors else None)

    def _answer(self, status: int, value: Any) -> None:  # noqa: ANN401 (JSON)
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
        """Quiet."""


def main() -> None:
    path, *token = sys.argv[1:]
    pynvml.nvmlInit()
    Handler.token = token[0] if token else None
    with socketserver.UnixStreamServer(path, Handler) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
