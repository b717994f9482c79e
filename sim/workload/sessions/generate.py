"""Generated sessions: requests at a mean rate, most of which are the next turn of somebody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.spec import bind_parameters, parse_spec
from voltana.sim.workload.arrivals.shapes import require_positive
from voltana.sim.workload.prompts import Prompts, Turns
from voltana.sim.workload.sessions import agent, chat
from voltana.sim.workload.sessions.agent import AgentParameters, draw_task
from voltana.sim.workload.sessions.chat import ChatParameters, draw_chat
from voltana.sim.workload.sessions.session import Session
from voltana.sim.workload.workload import Workload

_STREAM: Final = 103
"""Spawn key; others are in sim.workload.generate."""
_PILOT: Final = 2_000
"""Sessions that are drawn to find out how many requests a session has."""
_LEAD_SPANS: Final = 7
"""The world begins so many mean sessions before time 0: e^-7 of those open then are missed."""

Draw = Callable[[Any, np.random.Generator], Session]
KINDS: Final[Mapping[str, tuple[type[object], Draw, str]]] = {
    "chat": (ChatParameters, draw_chat, chat.LINE),
    "agent": (AgentParameters, draw_task, agent.LINE),
}
"""Name -> parameters, how one session is drawn, and one line."""


def is_session_workload(name: str) -> bool:
    """Whether a workload's name is one of sessions."""
    return name.partition(":")[0] in KINDS


def make_sessions(text: str, *, rate_rps: float, duration_s: float, seed: int) -> Workload:
    """Requests of sessions that begin as a Poisson process, as if it had always been so.

    Sessions that began before time 0 are there with the turns that they have left, whose prompts
    hold what was said before. The rate is right if answers took no time; where turns wait for
    them, a run's is a little lower.

    Args:
        text: `chat` or `agent`, perhaps with parameters: `chat:turns=5,think=30`.
        rate_rps: Mean rate of requests, requests/s.
        duration_s: Length; no turn's earliest arrival is later.
        seed: Of everything.

    Raises:
        VoltanaError: A parameter is unknown or out of range, or no request arrives.
    """
    require_positive(rate_rps=rate_rps, duration_s=duration_s)
    if seed < 0:
        raise VoltanaError(f"seed must be >= 0, got {seed}")
    spec = parse_spec(text)
    kind, draw, _ = KINDS[spec.name]
    parameters: Any = bind_parameters(spec, kind)
    mean_turns, mean_span_s = _means(spec.name, parameters)
    lead_s = _LEAD_SPANS * mean_span_s
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM, 0)))
    count = int(rng.poisson(rate_rps / mean_turns * (lead_s + duration_s)))
    starts_s = np.sort(rng.uniform(-lead_s, duration_s, count))
    rows: list[_Row] = []
    fresh = parameters.num_shared
    for start_s in starts_s.tolist():
        session = draw(parameters, rng)
        rows += _rows(session, start_s, duration_s, fresh)
        fresh += 2 * len(session.asked_tokens)
    if not rows:
        raise VoltanaError(f"{text}: no request arrives, raise rate_rps or duration_s")
    name = f"{text} at {rate_rps:g} requests/s"
    return _workload(rows, name, waits=parameters.waits)


@lru_cache(maxsize=16)
def _means(name: str, parameters: Any) -> tuple[float, float]:  # noqa: ANN401 (a parameter class)
    """Turns of a session, and seconds from its first to its last, on average."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_STREAM, 1)))
    drawn = [KINDS[name][1](parameters, rng) for _ in range(_PILOT)]
    turns = float(np.mean([len(s.asked_tokens) for s in drawn]))
    return turns, float(np.mean([sum(s.think_s) for s in drawn]))


class _Row:
    """One request, before all are put in order."""

    __slots__ = ("answer", "arrival_s", "before", "names", "output_tokens", "think_s", "tokens")

    def __init__(
        self, arrival_s: float, names: list[int], tokens: list[int], output_tokens: int,
        answer: int, before: _Row | None, think_s: float,
    ) -> None:  # fmt: skip
        self.arrival_s = arrival_s
        self.names = names
        self.tokens = tokens
        self.output_tokens = output_tokens
        self.answer = answer
        self.before = before
        self.think_s = think_s


def _rows(session: Session, start_s: float, duration_s: float, fresh: int) -> list[_Row]:
    """A session's requests whose earliest arrival is within the run.

    Its own messages and answers are named from `fresh` on, two a turn.
    """
    rows: list[_Row] = []
    names, tokens = list(session.opening), list(session.opening_tokens)
    now_s, before = start_s, None
    turns = zip(session.asked_tokens, session.answer_tokens, session.think_s, strict=True)
    for k, (asked, answered, think_s) in enumerate(turns):
        now_s += think_s
        if now_s >= duration_s:
            break
        answer = fresh + 2 * k + 1
        names.append(fresh + 2 * k)
        tokens.append(asked)
        if now_s >= 0.0:
            waited_s = think_s if before is not None else 0.0
            row = _Row(now_s, list(names), list(tokens), answered, answer, before, waited_s)
            rows.append(row)
            before = row
        names.append(answer)
        tokens.append(answered)
    return rows


def _workload(rows: list[_Row], name: str, *, waits: bool) -> Workload:
    rows.sort(key=lambda row: row.arrival_s)
    place = {id(row): k for k, row in enumerate(rows)}
    turns = None
    if waits:
        previous = [-1 if row.before is None else place[id(row.before)] for row in rows]
        turns = Turns(
            previous=np.array(previous, dtype=np.int64),
            think_s=np.array([row.think_s for row in rows]),
        )
    return Workload(
        arrival_s=np.array([row.arrival_s for row in rows]),
        input_tokens=np.array([sum(row.tokens) for row in rows], dtype=np.int64),
        output_tokens=np.array([row.output_tokens for row in rows], dtype=np.int64),
        name=name,
        prompts=Prompts.of_rows(
            [row.names for row in rows], [row.tokens for row in rows], [row.answer for row in rows]
        ),
        turns=turns,
    )
