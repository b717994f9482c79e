"""One knob a policy: its search against closed forms, and how contenders are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from voltana.experiments.frontier.contenders import parse_contender
from voltana.experiments.frontier.knob import search_knob
from voltana.experiments.frontier.trial import Trial
from voltana.profiles.common.errors import VoltanaError

Law = Callable[[float, int], tuple[float, float]]
"""Position of the knob and number of the repeat -> attainment and energy."""
REPEATS = 3


def play(law: Law, target: float = 0.99) -> tuple[Trial, list[tuple[float, bool]]]:
    """Search the knob of a law; returns what was found, and what was asked for."""
    asked = []

    def attempt(position: float, on_all: bool) -> Trial:
        asked.append((position, on_all))
        points = [law(position, r) for r in range(REPEATS if on_all else 1)]
        attainments, energies = zip(*points, strict=True)
        return Trial(settings={}, label=f"{position:.4f}", attainments=attainments,
                     energies_j=energies)  # fmt: skip

    return search_knob(attempt, target), asked


def test_the_knob_closes_in_on_the_crossing() -> None:
    """Attainment falls through 0.99 at 0.613 of the range, energy falls throughout."""
    found, _ = play(lambda x, _: (1.0 if x <= 0.613 else 0.9, 100 - 50 * x))
    # five positions leave a bracket of 1/4, three halvings 1/32
    assert 0.613 - 1 / 32 <= float(found.label) <= 0.613


def test_energy_that_turns_up_again_is_followed_to_its_least() -> None:
    found, _ = play(lambda x, _: (1.0, 10 + (x - 0.4) ** 2))
    assert float(found.label) == pytest.approx(0.4, abs=1 / 32)


def test_a_setting_that_keeps_the_first_repeat_alone_is_not_chosen() -> None:
    """Beyond 0.5 the other repeats miss: the choice is the cheapest that keeps all of them."""
    found, asked = play(lambda x, r: (1.0 if x <= 0.5 or r == 0 else 0.98, 100 - 50 * x))
    assert float(found.label) <= 0.5
    assert found.keeps(0.99)
    assert any(on_all for x, on_all in asked if x > 0.5)


def test_a_target_out_of_reach_ends_soon_with_the_nearest_miss() -> None:
    found, asked = play(lambda x, _: (0.95 - (x - 0.3) ** 2, 100.0))
    assert not found.keeps(0.99)
    assert float(found.label) == pytest.approx(0.3, abs=0.1)
    assert len(asked) <= 5 + 2 * 3 + 1


@pytest.mark.parametrize(
    ("text", "knob", "cheap"),
    [
        ("ecofreq + ecoroute", "margin", {"controller": "ecofreq:margin=0.5000"}),
        ("ecofreq:idle=1 + ecoroute", "margin", {"controller": "ecofreq:idle=1,margin=0.5000"}),
        ("ecofreq:margin=0 + ecoroute", "aim_ratio", {"aim_ratio": "1.6000"}),
        ("window + least-kv", "aim_ratio", {"controller": "window", "aim_ratio": "1.6000"}),
        ("static:f=1005 + round-robin", "", {"controller": "static:f=1005"}),
        ("ecomin:headroom={0.4..0.1} + slo-pack:headroom={}", "headroom",
         {"controller": "ecomin:headroom=0.1000", "router": "slo-pack:headroom=0.1000"}),
    ],
)  # fmt: skip
def test_every_policy_has_its_knob(text: str, knob: str, cheap: dict[str, str]) -> None:
    contender = parse_contender(text)
    assert contender.knob == knob
    assert contender.at(1.0).items() >= cheap.items()
    assert "{" not in "".join([contender.controller, contender.router, *contender.plain.values()])


def test_a_policy_at_its_default_has_no_knob_set() -> None:
    chosen = parse_contender("ecomin:headroom={0.4..0.1},dwell=0 + slo-pack:headroom={}")
    assert chosen.plain == {"controller": "ecomin:dwell=0", "router": "slo-pack"}
    assert parse_contender("window + least-kv").plain == {
        "controller": "window", "router": "least-kv",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["ecofreq", "ecofreq+ecoroute", "ecofreq:margin={0..1} + ecoroute:margin={0..1}"]
)
def test_what_is_no_contender_is_refused(text: str) -> None:
    with pytest.raises(VoltanaError, match="a contender"):
        parse_contender(text)
