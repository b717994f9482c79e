"""Prefill power where the engine pauses: a card of known busy power, through real sockets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest

from tests.hwreplay.engine_voice import EngineVoice, repeating
from tests.profiles.measure.test_measure import FACTS
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.gpu import GpuIdentity
from voltana.profiles.engines.base import Engine, Point, PreparedPoint
from voltana.profiles.engines.sglang import Bursts
from voltana.profiles.engines.sglang_client import Client, Endpoint, Endpoints, Records
from voltana.profiles.measure.assemble import power_provenance
from voltana.profiles.measure.power import Reading
from voltana.profiles.measure.trial import (
    GAPS,
    NOT_MEASURED,
    Protocol,
    Trial,
    measure_point,
    without_pauses,
)

BUSY_W = 400.0
IDLE_W = 60.0
POINT = Point(phase="prefill", batch_size=2, tokens=16)
RULES = Protocol(window_s=1.0, min_iterations=5, num_trials=1, warm_up_s=0.2)


class Card(ConstantPowerGpu):
    """Draws 400 W while its engine computes and 60 W while it does not.

    The counter is exact, or is written every `tick_s`.
    """

    def __init__(self, tick_s: float = 0.0) -> None:
        super().__init__(BUSY_W)
        self._lock = threading.Lock()
        self._spans_s: list[tuple[float, float]] = []
        self._busy_since_s: float | None = None
        self._begun_s = time.monotonic()
        self._tick_s = tick_s

    @property
    def identity(self) -> GpuIdentity:
        return replace(super().identity, is_power_measured=True)

    def compute(self, duration_s: float) -> None:
        with self._lock:
            self._busy_since_s = time.monotonic()
        time.sleep(duration_s)
        with self._lock:
            self._spans_s.append((self._busy_since_s, time.monotonic()))
            self._busy_since_s = None

    def energy_j(self) -> float:
        with self._lock:
            at_s = time.monotonic() - self._begun_s
            if self._tick_s:
                at_s = int(at_s / self._tick_s) * self._tick_s
            until_s, spans_s = self._begun_s + at_s, list(self._spans_s)
            if self._busy_since_s is not None:
                spans_s.append((self._busy_since_s, until_s))
        busy_s = sum(max(min(end_s, until_s) - start_s, 0.0) for start_s, end_s in spans_s)
        return IDLE_W * at_s + (BUSY_W - IDLE_W) * busy_s

    def power_w(self) -> float:
        return IDLE_W if self._busy_since_s is None else BUSY_W


@dataclass
class Prefiller:
    """One server: all that waits runs as one pass, as SGLang does within its budget."""

    card: Card
    voice: EngineVoice
    pass_s: float
    waiting: list[tuple[int, int, threading.Event]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.ended.is_set():
            with self.lock:
                batch, self.waiting = self.waiting, []
            if not batch:
                time.sleep(0.0005)
                continue
            begun_s = time.monotonic()
            self.card.compute(self.pass_s * len(batch))
            number, tokens = (sum(column) for column in zip(*(b[:2] for b in batch), strict=True))
            self.voice.say(
                wall_time_s=time.monotonic() - begun_s,
                num_prefill_requests=number,
                sum_prefill_tokens=tokens,
            )
            for _, _, done in batch:
                done.set()

    def ask(self, prompts: list[list[int]]) -> None:
        done = threading.Event()
        with self.lock:
            self.waiting.append((len(prompts), sum(map(len, prompts)), done))
        done.wait(30)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "input_ids" in body:
            self.server.prefiller.ask(body["input_ids"])  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(
    tmp_path: Path, pass_s: float, tick_s: float
) -> Iterator[tuple[Card, Endpoints, EngineVoice]]:
    card, voice = Card(tick_s), EngineVoice(tmp_path / "metrics")
    prefiller = Prefiller(card, voice, pass_s)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.prefiller = prefiller  # type: ignore[attr-defined]
    threads = [threading.Thread(target=run) for run in (server.serve_forever, prefiller.run)]
    for thread in threads:
        thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    endpoint = Endpoint(url=url, metrics=voice.address, bootstrap_port=1)
    try:
        yield card, Endpoints(prefill=endpoint, decode=endpoint), voice
    finally:
        prefiller.ended.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
        voice.close()


class Bursting:
    """The part of the sglang engine that holds a prefill point."""

    def __init__(self, client: Client, records: Records) -> None:
        self._client, self._records = client, records

    @contextmanager
    def open(self, point: Point) -> Iterator[PreparedPoint]:
        yield Bursts(point, self._client, self._records, FACTS)


def measured(tmp_path: Path, pass_s: float, *, tick_s: float = 0.0) -> Trial:
    with serving(tmp_path, pass_s, tick_s) as (card, servers, voice):
        client = Client(servers, 100)
        with repeating(voice.say):  # heartbeats, until it is heard
            records = Records(servers.prefill.metrics)
            records.__enter__()
        engine = cast(Engine, Bursting(client, records))
        (trial,) = measure_point(engine, [card], POINT, RULES, pause_w=IDLE_W)
        client.close()
        records.close()
    return trial


@pytest.mark.parametrize("pass_s", [0.2, 0.06])
def test_prefill_power_is_that_of_the_passes_at_every_speed(tmp_path: Path, pass_s: float) -> None:
    """True 400 W. Bursts one at a time gave 110 to 267 W, and less the faster the clock.

    5 %: a pass's time is its server's own, the card's a scheduler's hiccup longer.
    """
    trial = measured(tmp_path, pass_s)
    assert trial.power_w == pytest.approx(BUSY_W, rel=0.05)
    assert NOT_MEASURED not in trial.flags
    assert trial.time_s == pytest.approx(pass_s, rel=0.25)
    assert trial.tokens == POINT.tokens


def test_a_counter_that_ticks_leaves_the_power_as_it_is(tmp_path: Path) -> None:
    """Ticks of 0.4 s, windows of 1 s from one tick to another: all that is counted is the passes'.

    From anywhere to anywhere a tick holds rest before the passes, or lacks their end: up to 30 %.
    """
    trial = measured(tmp_path, 0.06, tick_s=0.4)
    assert trial.power_w == pytest.approx(BUSY_W, rel=0.05)


def reading(busy_s: float, pauses_s: float, pause_w: float = IDLE_W) -> Reading:
    return Reading(
        energy_j=BUSY_W * busy_s + pause_w * pauses_s, duration_s=busy_s + pauses_s,
        source="counter", throttle=frozenset(), median_clock_mhz=1005, highest_temperature_c=40.0,
    )  # fmt: skip


def test_pauses_are_taken_out_at_the_idle_power() -> None:
    found, flag = without_pauses(reading(0.6, 0.4), 0.6, IDLE_W)
    assert found.power_w == pytest.approx(BUSY_W)
    assert found.duration_s == pytest.approx(0.6)
    assert flag == GAPS
    assert without_pauses(reading(0.99, 0.01), 0.99, IDLE_W)[1] is None


@pytest.mark.parametrize(
    ("busy_s", "pause_w"), [(0.2, IDLE_W), (0.6, None), (0.0, IDLE_W), (0.6, 390.0)]
)
def test_what_pauses_hide_is_not_called_measured(busy_s: float, pause_w: float | None) -> None:
    """Mostly pauses, an unknown idle power, no work at all, a rest dearer than the work."""
    found, flag = without_pauses(reading(busy_s, 1.0 - busy_s), busy_s, pause_w)
    assert flag == NOT_MEASURED
    assert found.energy_j > 0


def test_one_such_trial_and_the_phases_power_is_modelled(tmp_path: Path) -> None:
    identities, facts = [Card().identity], replace(FACTS, is_on_gpu=True)
    good = Trial(
        tokens=16, time_s=0.06, spread_s=0.0, power_w=BUSY_W, energy_source="counter",
        temperature_c=40.0, clock_mhz=1005, num_iterations=5, flags=(GAPS,),
    )  # fmt: skip
    bad = replace(good, flags=(NOT_MEASURED,))
    made = power_provenance([good, good], identities, facts)
    assert made.status == "measured"
    assert "pauses were taken out at the idle power" in made.uncertainty
    made = power_provenance([good, bad], identities, facts)
    assert made.status == "modelled"
    assert "in 1 of 2 trials the engine paused too long" in made.source
