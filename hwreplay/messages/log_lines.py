"""The log of a service: one JSON object a line, whichever of its processes speaks.

    {"time":"2026-11-28T00:31:58.123Z","level":"warning","part":"router","event":"…", …}

`level` is debug, info, warning or error, `part` the process, `event` what has happened; further
keys are the event's own, with their units in their names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

ENVIRONMENT: Final = "VOLTANA_LOG"
"""Least level of the lines that a process writes; without it a process logs for people."""
KEYS: Final = ("time", "level", "part", "event")
MAX_TEXT: Final = 4000
"""Characters of a foreign line that are kept."""


class JsonLines(logging.Formatter):
    """Makes a log record a line; its `fields` are the event's own keys."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "part": getattr(record, "part", self._part),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def start_log(part: str) -> None:
    """Log to stderr: in lines as above where the environment names a level, else for people."""
    level = os.environ.get(ENVIRONMENT)
    if level is None:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        return
    # who has called is in no line, and is dear to find out: see "Optimization" in Python's HOWTO
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(part))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)


def say(log: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log an event with keys of its own.

    Args:
        log: Where.
        level: As of `logging`.
        event: What has happened, always in the same words.
        fields: The event's keys; a quantity's name ends in its unit.
    """
    log.log(level, event, extra={"fields": fields})


def is_line(text: bytes) -> bool:
    """Whether a process has written a line of the log, and not something of its own."""
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return isinstance(found, Mapping) and all(key in found for key in KEYS)


def read_line(text: bytes) -> dict[str, Any]:
    """The keys of a line."""
    found: dict[str, Any] = msgspec.json.decode(text)
    return found


def _time(created_s: float) -> str:
    at = datetime.fromtimestamp(created_s, tz=UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
