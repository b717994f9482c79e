"""Transfers that divide a link: by hand, and that no byte is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.profiles.synthetic import constant_time_s, write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.catalog import Profile
from voltana.sim.engine.agenda import HeapAgenda
from voltana.sim.engine.physics.transfers import SharedLink
from voltana.sim.engine.request import SimRequest


@pytest.fixture
def halves(tmp_path: Path) -> Profile:
    """Every iteration takes half a second; a token's KV cache is 1,024 bytes."""
    return write_synthetic_profile(
        tmp_path, time_s=constant_time_s, power_w=lambda p, f, b, t: 100.0
    )


def ends_of(begins: list[tuple[float, float]], bytes_per_s: float) -> list[float]:
    """When transfers of (begin, bytes) over one link end."""
    agenda, ends = HeapAgenda(), [-1.0] * len(begins)

    def deliver(request: SimRequest, now_s: float) -> None:
        ends[request.request_id] = now_s

    link = SharedLink(bytes_per_s, agenda.call_at, deliver)
    for k, (begin_s, num_bytes) in enumerate(begins):
        request = SimRequest(k, begin_s, 1, 1)
        agenda.call_at(begin_s, lambda at_s, r=request, n=num_bytes: link.begin(r, n, at_s))  # type: ignore[misc]
    agenda.play(float("inf"))
    return ends


@pytest.mark.parametrize("by", ["prefill", "decode", "fleet"])
@pytest.mark.parametrize("count", [1, 2])
def test_two_equal_transfers_at_once_take_twice_as_long(
    halves: Profile, by: str, count: int
) -> None:
    """8,192 bytes over 16,384 a second: sent at 0.5 s, there at 1.0 s alone and at 1.5 s together.

    A decode iteration later their first tokens are out.
    """
    record, _ = run(
        halves, make_requests(*[(0.0, 8, 1)] * count), kv_transfer_bytes_per_s=16_384,
        kv_transfers=f"shared_by_{by}",
    )  # fmt: skip
    assert record.requests.first_token_s.tolist() == [1.0 + 0.5 * count] * count


@pytest.mark.parametrize(
    ("by", "num_prefill", "num_decode", "transfer_s"),
    [
        ("prefill", 2, 1, 0.5), ("prefill", 1, 2, 1.0),
        ("decode", 2, 1, 1.0), ("decode", 1, 2, 0.5), ("fleet", 2, 2, 1.0),
    ],
)  # fmt: skip
def test_whose_link_it_is(
    halves: Profile, by: str, num_prefill: int, num_decode: int, transfer_s: float
) -> None:
    """Two requests, each on instances of its own where there are two."""
    record, _ = run(
        halves, make_requests(*[(0.0, 8, 1)] * 2), kv_transfer_bytes_per_s=16_384,
        kv_transfers=f"shared_by_{by}", num_prefill=num_prefill, num_decode=num_decode,
    )  # fmt: skip
    assert record.requests.first_token_s.tolist() == [0.5 + transfer_s + 0.5] * 2


def test_a_short_transfer_overtakes_a_long_one() -> None:
    """A byte a second. By 2 s the first has got 2 of 8; then each gets half a byte a second, and
    the second's 2 bytes are over at 6 s, when the first has 4 left, alone: 10 s."""
    assert ends_of([(0.0, 8.0), (2.0, 2.0)], 1.0) == [10.0, 6.0]


def test_the_link_works_as_long_as_bytes_are_there() -> None:
    """Whoever gets what: busy times are those of a queue with the same bytes, and nobody is there
    sooner than alone, or ends later than after all that is under way with it."""
    rng = np.random.default_rng(8)
    begins_s = np.cumsum(rng.exponential(1.0, 400))
    sizes = rng.exponential(0.9, 400)
    ends = np.array(ends_of(list(zip(begins_s.tolist(), sizes.tolist(), strict=True)), 1.0))
    free_s, busy_until = 0.0, []
    for begin_s, size in zip(begins_s, sizes, strict=True):
        free_s = max(free_s, begin_s) + size
        busy_until.append(free_s)
    last_of_period = np.append(begins_s[1:] > np.array(busy_until)[:-1], True)
    assert last_of_period.sum() > 20
    first = 0
    for last in np.flatnonzero(last_of_period).tolist():
        assert ends[first : last + 1].max() == pytest.approx(busy_until[last], rel=1e-12)
        first = last + 1
    assert (ends >= begins_s + sizes - 1e-9).all()
