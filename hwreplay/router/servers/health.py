"""Asks a server whether it is well."""

from __future__ import annotations

from typing import Final

import aiohttp

REFUSED: Final = "it takes no connections"
LATE: Final = "its health check takes"


async def ask_health(
    session: aiohttp.ClientSession, url: str, timeout: aiohttp.ClientTimeout
) -> str | None:
    """What is wrong with a server; None if it answers.

    Args:
        session: To ask with.
        url: Of its health check.
        timeout: For its answer.
    """
    try:
        async with session.get(url, timeout=timeout) as answer:
            await answer.read()
            return None if answer.status < 500 else f"its health check answers {answer.status}"
    except TimeoutError:
        return f"{LATE} more than {timeout.total:g} s"
    except aiohttp.ClientConnectorError as error:
        return f"{REFUSED} ({error})"
    except aiohttp.ClientError as error:
        return f"{type(error).__name__}: {error}"
