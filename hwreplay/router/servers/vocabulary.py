"""How many token ids the servers' model has: SGLang checks no id, and a wrong one ends a server.

SGLang names the folder of its model at /model_info; the size stands in that folder's config.json.
A router on another machine, or a model that is named as on a hub, needs `[router] vocab_size`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import aiohttp

MODEL_INFO: Final = "/model_info"
CONFIG: Final = "config.json"


async def ask_vocab_size(
    session: aiohttp.ClientSession, url: str, timeout: aiohttp.ClientTimeout
) -> int | None:
    """The vocabulary of the model that a server has loaded; None if it does not tell.

    Args:
        session: To ask with.
        url: The server's base URL.
        timeout: For its answer.
    """
    try:
        async with session.get(url.rstrip("/") + MODEL_INFO, timeout=timeout) as answer:
            info = json.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
    if not isinstance(info, dict):
        return None
    path = info.get("model_path")
    return read_vocab_size(Path(path)) if isinstance(path, str) and path else None


def read_vocab_size(model: Path) -> int | None:
    """What the config.json of a model's folder says; None if it cannot be read or does not say."""
    try:
        found = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    text = found.get("text_config")  # of a model that also sees or hears
    size = (text if isinstance(text, dict) else found).get("vocab_size")
    return size if type(size) is int and size > 0 else None
