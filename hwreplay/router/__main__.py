"""`python -m voltana.hwreplay.router CONFIG.toml [TOKEN]`: its first line of output is its address.

TOKEN is a file. SIGHUP reads CONFIG.toml again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

from voltana.hwreplay.router.config import RouterConfig, read_router_config, read_token
from voltana.hwreplay.router.service import run_router
from voltana.profiles.common.errors import VoltanaError

POLL_S: Final = 0.5


def main() -> None:
    """Run one router; it ends with its parent."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    path, *token = map(Path, sys.argv[1:])

    def read() -> RouterConfig:
        return read_router_config(path, token=read_token(token[0] if token else None))

    try:
        run_router(
            read(),
            lambda url: print(url, flush=True),  # noqa: T201 (this is the output)
            read,
        )
    except VoltanaError as error:
        sys.stderr.write(f"voltana router: {error}\n")
        sys.exit(2)


def _end_with(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
