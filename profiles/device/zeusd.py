"""Clocks and power limits through zeusd, where that daemon runs already: no rights needed here.

zeusd wraps NVML's privileged calls behind HTTP on a Unix socket or a port and leaves a lock in
force whoever dies: giving back is ours to do. Cards are read by NVML as ever, for which nobody
needs a right, and are the same by number: so its list must be this machine's.

Source: https://ml.energy/zeus/zeusd/, "HTTP API reference" (zeusd 0.4 and later).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from voltana.profiles.device.gpu import (
    DeviceError,
    DriverMissingError,
    PermissionDeniedError,
    UnsupportedQueryError,
)
from voltana.profiles.device.nvml import NvmlGpu

TIMEOUT_S: Final = 5.0
TOKEN: Final = "ZEUSD_TOKEN"
"""Variable with the bearer token, as zeusd's own clients read it."""
CONTROL: Final = "gpu-control"
"""The group of calls that set clocks and limits; `zeusd serve --enable` may leave it out."""
_KINDS: Final = {
    400: UnsupportedQueryError,
    401: PermissionDeniedError,
    403: PermissionDeniedError,
    404: PermissionDeniedError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What a daemon says of itself."""

    names: tuple[str, ...]
    """Of its cards, by their numbers from 0."""
    can_control: bool
    needs_token: bool


class Zeusd:
    """Speaks to one daemon. Each call is a connection of its own: none goes stale in between."""

    def __init__(self, address: str) -> None:
        """Connect to nothing yet.

        Args:
            address: The socket's path, or HOST:PORT.
        """
        self.address = address

    def discover(self) -> Discovery:
        """Its cards, and whether it sets clocks.

        Raises:
            DeviceError: It does not answer, or is older than 0.4.
        """
        data = self._ask("GET", "/discover")
        try:
            cards = {int(gpu["id"]): str(gpu["name"]) for gpu in data["gpus"]}
            groups = list(data["enabled_api_groups"])
            needs_token = bool(data["auth_required"])
        except (KeyError, TypeError, ValueError):
            raise DeviceError(
                f"zeusd must list its cards at /discover, {self.address} does not: update it to "
                "0.4 or later"
            ) from None
        return Discovery(
            names=tuple(cards[index] for index in sorted(cards)),
            can_control=CONTROL in groups,
            needs_token=needs_token,
        )

    def lock_clock(self, gpu: int, clock_mhz: int) -> None:
        """Pin a card's SM clock."""
        clocks = {"min_clock_mhz": clock_mhz, "max_clock_mhz": clock_mhz}
        self._set("set_gpu_locked_clocks", gpu, clocks)

    def unlock_clock(self, gpu: int) -> None:
        """Give a card's clock back to the driver."""
        self._set("reset_gpu_locked_clocks", gpu, {})

    def set_power_limit(self, gpu: int, limit_w: float) -> None:
        """Set a card's power limit."""
        self._set("set_power_limit", gpu, {"power_limit_mw": round(limit_w * 1e3)})

    def _set(self, call: str, gpu: int, values: dict[str, int]) -> None:
        words = {"gpu_ids": gpu, **values, "block": "true"}  # its answer is the driver's
        self._ask("POST", f"/gpu/{call}?{urlencode(words)}")

    def _ask(self, method: str, target: str) -> Any:  # noqa: ANN401 (JSON)
        headers = {}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        connection = self._connection()
        try:
            connection.request(method, target, headers=headers)
            answer = connection.getresponse()
            body, status = answer.read(), answer.status
        except (OSError, http.client.HTTPException) as error:
            raise DeviceError(
                f"zeusd must answer at {self.address}, it does not "
                f"({type(error).__name__} {error}): start it, and let this user open its socket"
            ) from None
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            kind = _KINDS.get(status, DeviceError)
            said = " ".join(body.decode(errors="replace").split())[:200]
            raise kind(
                f"zeusd must do {target.partition('?')[0]}, got {status} {said}: enable its "
                f"{CONTROL}, and give {TOKEN} where it asks for a token"
            )
        return json.loads(body) if body else None

    def _connection(self) -> http.client.HTTPConnection:
        if "/" in self.address:
            return _UnixConnection(self.address)
        return http.client.HTTPConnection(self.address, timeout=TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


class ZeusdGpu(NvmlGpu):
    """A card that NVML reads and zeusd sets."""

    def __init__(self, index: int, zeusd: Zeusd) -> None:
        """Open it.

        Raises:
            DeviceError: No such card, or not the same one there.
        """
        super().__init__(index)
        self._zeusd = zeusd
        try:
            found = zeusd.discover()
            _check_same(found, index, self.identity.name, self.num_cards())
        except DeviceError:
            self.close()
            raise

    def lock_clock(self, clock_mhz: int) -> None:
        self._zeusd.lock_clock(self.identity.index, clock_mhz)

    def unlock_clock(self) -> None:
        self._zeusd.unlock_clock(self.identity.index)

    def set_power_limit(self, limit_w: float) -> None:
        self._zeusd.set_power_limit(self.identity.index, limit_w)


def _check_same(found: Discovery, index: int, name: str, num_cards: int) -> None:
    """Refuse a daemon that counts other cards than this process: it would set a stranger's."""
    if not found.can_control:
        raise PermissionDeniedError(
            f"zeusd must have {CONTROL} enabled, it has not: start it as root with --enable "
            f"{CONTROL}"
        )
    if len(found.names) != num_cards or found.names[index] != name:
        raise DriverMissingError(
            f"zeusd's cards must be this process's, it has {list(found.names)} where NVML here has "
            f"{num_cards} and number {index} is {name!r}: run both on the same side of a container"
        )
