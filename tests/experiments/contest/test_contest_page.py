"""The contest's page: every number in it is one of the table's."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tests.conftest import ROOT
from voltana.experiments.contest.page import (
    BEGIN,
    END,
    page_text,
    readme_text,
    replaced,
    shares,
)
from voltana.experiments.contest.run import read_contest
from voltana.experiments.frontier.search import DEFAULT, HINDSIGHT, STATIC_FLEET, STATIC_MAX
from voltana.experiments.frontier.table import COLUMNS
from voltana.profiles.common.errors import VoltanaError

CSV = ROOT / "results" / "contest.csv"


def block(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def test_the_page_and_the_readme_say_what_the_table_says() -> None:
    """`voltana frontier --contest --docs docs` has been run since the table changed."""
    table = read_contest(CSV)
    page = (ROOT / "docs" / "contest.md").read_text(encoding="utf-8")
    assert block(page) == page_text(table).strip()
    assert block((ROOT / "README.md").read_text(encoding="utf-8")) == readme_text(table)


def test_no_other_number_of_the_page_is_a_result() -> None:
    """Outside the marks the page names loads and rules: no energy and no saving."""
    page = (ROOT / "docs" / "contest.md").read_text(encoding="utf-8")
    rest = page.partition(BEGIN)[0] + page.partition(END)[2]
    assert not re.findall(r"\d kJ|±|saves? \d|\d+(?:\.\d+)? % (?:less|more)", rest)


def test_the_table_holds_what_it_must() -> None:
    """Savings stand at equal attainment alone, and every load has its static-max and fleets."""
    table = read_contest(CSV)
    savings = ["saving_vs_static_max_pct", "saving_vs_best_pair_same_router_pct", "times_bound"]
    assert table.loc[table["attainment"] < 0.99, savings].isna().all(axis=None)
    assert (table["times_bound"].dropna() > 1.0).all()
    for _, lines in table.groupby(["workload", "fleet", "load"]):
        assert {STATIC_MAX, STATIC_FLEET} <= set(lines["controller"])
        against = lines["saving_vs_best_pair_same_router_pct"].notna()
        for router in lines.loc[against, "router"].unique():
            fleets = lines[(lines["controller"] == STATIC_FLEET) & (lines["router"] == router)]
            assert fleets["attainment"].max() >= 0.99  # the pair keeps the target, too


def lines_of(router: str, fleet: float, policy: float) -> list[list[object]]:
    shared: list[object] = ["sharegpt", "2P2D", "20 requests/s", router]
    return [
        [*shared, STATIC_MAX, "1410/1410 MHz", 1.0, 1.0, 100.0, 1.0, 0.0, -9.0, 1.0, 2.0],
        [*shared, STATIC_FLEET, "1005/705 MHz", 1.0, 1.0, 60.0, 1.0, fleet, None, None, 1.3],
        [*shared, "ecofreq", "margin 0.1", 1.0, 1.0, 55.0, 1.0, policy, 4.0, 1.0, 1.2],
        [*shared, "ecofreq", DEFAULT, None, 0.97, 54.0, 1.0, None, None, None, None],
    ]


def test_shares_are_of_clock_router_and_controller() -> None:
    """Fixed clocks 40 %, with the better router 47 %, with the better policy 49 %."""
    rows = [*lines_of("round-robin", 40.0, 41.0), *lines_of("consolidate", 47.0, 49.0)]
    found = shares(pd.DataFrame(rows, columns=[*COLUMNS])).iloc[0]
    assert (found["fixed"], found["routed"], found["chosen"]) == (40.0, 47.0, 49.0)
    assert found["routed_line"]["router"] == found["chosen_line"]["router"] == "consolidate"


def test_a_fallen_choice_is_told() -> None:
    rows = lines_of("round-robin", 40.0, 41.0)
    rows[1][7] = 0.9  # kept on each tuning repeat, not when judged
    rows.append([*rows[1][:5], f"1005/810 MHz, {HINDSIGHT}", None, 1.0, *rows[1][8:]])
    text = page_text(pd.DataFrame(rows, columns=[*COLUMNS]))
    told = "| sharegpt, 2P2D, 20 requests/s | static fleet + round-robin | 1005/705 MHz "
    assert f"{told}| 100.00 | 90.00 |" in text


def test_a_page_without_marks_is_refused() -> None:
    assert replaced(f"a{BEGIN}old{END}b", "new") == f"a{BEGIN}\n\nnew\n{END}b"
    with pytest.raises(VoltanaError, match=r"contest\.md must hold the lines"):
        replaced("nothing", "new")
