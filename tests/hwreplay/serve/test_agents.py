"""A service's agents where the machine has no room for them."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from voltana.hwreplay.serve import agents
from voltana.profiles.common.errors import VoltanaError


def test_a_start_on_a_full_disk_ends_and_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", "agent-decode-0.json")

    async def play() -> None:
        run: Any = SimpleNamespace(directory=tmp_path)
        config: Any = SimpleNamespace(guard=None, dcgm=None, log_level="info")
        parts = agents.AgentParts(run, config, changed=lambda: None)
        monkeypatch.setattr(parts, "_make_groups", lambda: [[SimpleNamespace(name="decode-0")]])
        with pytest.raises(VoltanaError, match=r"No space left on device: 'agent-decode-0\.json'"):
            await asyncio.wait_for(parts.start(), 10)
        await parts.end()

    monkeypatch.setattr(agents, "write_agents", write)
    asyncio.run(play())
