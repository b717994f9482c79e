"""`voltana report`: what it reads, and its page in a real browser without network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from voltana.experiments.compare.policies import add_saving
from voltana.experiments.report.charts import curves, pareto_front, styles_of
from voltana.experiments.report.collect import collect
from voltana.experiments.report.page import write_report
from voltana.experiments.report.series import choose, from_iterations, series_of
from voltana.experiments.runs import run
from voltana.experiments.study.suite import find_experiment, read_experiment
from voltana.experiments.sweep.grid import expand
from voltana.experiments.sweep.run import run_sweep
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig
from voltana.sim.results import write_run

RATES = (20, 36, 40)
GRID = {
    "base": {"duration_s": 8, "slo_itl_s": 0.045},
    "grid": {
        "rate_rps": list(RATES),
        "policy": [
            {"name": "static-max", "controller": "static", "router": "round-robin"},
            {"name": "ecofreq", "controller": "ecofreq", "router": "ecoroute"},
            {"name": "pid", "controller": "pid", "router": "round-robin"},
        ],
    },
    "static_pairs": {"clocks_mhz": [1005, 1410]},
}
PATIENCE_MS = 300_000
"""A page takes 3 s on an idle machine and a minute on one that is busy with something else."""
CONFIG = SimConfig(rate_rps=20, duration_s=4, timeline_interval_s=0.1)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    run_sweep(expand(GRID, "test"), directory, jobs=1)
    return directory


@pytest.fixture(scope="module")
def page_file(sweep: Path) -> Path:
    out = sweep / "report.html"
    assert write_report(sweep, out, target=0.99, wanted=()) == []
    return out


def test_pareto_front_by_hand() -> None:
    # (energy, attainment): a is cheapest, c has the best attainment, b lies between; d costs more
    # than b for less, e costs as much as c for less, f equals b and neither beats the other
    energy = [1.0, 2.0, 4.0, 3.0, 4.0, 2.0]
    attainment = [0.5, 0.8, 1.0, 0.7, 0.9, 0.8]
    assert pareto_front(energy, attainment).tolist() == [True, True, True, False, False, True]


def test_a_sweep_is_compared_within_its_load_points(sweep: Path) -> None:
    results = collect(sweep)
    assert results.series == "policy"
    assert results.loads == ("rate_rps",)
    assert results.x == "rate_rps"
    assert len(results.load_points()) == len(RATES)
    for _, rows in results.load_points():
        energy_j = dict(zip(rows["policy"], rows["energy_j"], strict=True))
        saving = dict(zip(rows["policy"], rows["saving_pct"], strict=True))
        assert saving["static-max"] == 0
        expected = 100 * (1 - energy_j["pid"] / energy_j["static-max"])
        assert saving["pid"] == pytest.approx(expected, rel=1e-12)


def test_an_experiment_brings_its_question_and_its_axis(tmp_path: Path) -> None:
    chosen = read_experiment(find_experiment("slo-tightness"), quick=True)
    panel = chosen.points[0].labels["panel"]
    directory = tmp_path / "slo-tightness-quick"
    run_sweep([p for p in chosen.points if p.labels["panel"] == panel], directory, jobs=1)
    results = collect(directory)
    assert results.question == chosen.question
    assert results.baseline == chosen.figure.baseline
    # the axis of slo_ttft_s follows from it, and it is drawn in ms
    assert results.loads == (chosen.figure.x,) == ("slo_itl_s",)
    drawn = curves(results, results.table, styles_of(results))
    promises_ms = sorted({1e3 * p.config.slo_itl_s for p in chosen.points})
    assert list(drawn.data[0].x) == pytest.approx(promises_ms, rel=1e-12)
    assert "ms" in drawn.layout.xaxis3.title.text


def test_series_of_a_sweep_are_the_same_runs_again(sweep: Path) -> None:
    results = collect(sweep)
    rows = choose(results, ())
    assert {row["policy"] for row in rows} == {"static-max", "ecofreq", "pid"}
    assert len({row["rate_rps"] for row in rows}) == 1
    found = series_of(results, rows[1])
    assert found.note == "simulated again from its configuration"
    assert found.ttft is not None
    # its mean over requests is the sweep's own number: the same run, seen in more detail
    mean_s = found.ttft["ttft_s"].mean()
    assert mean_s == pytest.approx(rows[1]["ttft_mean_s"], rel=1e-12)


def test_a_result_of_another_program_version_is_called_out(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "old")
    table = pd.read_csv(tmp_path / "old" / "results.csv")
    table["energy_j"] *= 1.001
    table.to_csv(tmp_path / "old" / "results.csv", index=False)
    results = collect(tmp_path / "old")
    assert "have changed since" in series_of(results, choose(results, ())[0]).note


def test_named_series_and_their_mistakes(sweep: Path) -> None:
    results = collect(sweep)
    wanted = results.table["id"].iloc[-1]
    assert [row["id"] for row in choose(results, [wanted[:6]])] == [wanted]
    with pytest.raises(VoltanaError, match="no run whose id begins with 'nowhere'"):
        choose(results, ["nowhere"])


def test_a_run_and_a_folder_of_runs(tmp_path: Path) -> None:
    write_run(run(CONFIG), tmp_path / "a")
    write_run(run(replace(CONFIG, controller="static")), tmp_path / "b")
    one = collect(tmp_path / "a")
    found = series_of(one, choose(one, ())[0])
    assert found.note == "as the run kept it"
    assert set(found.timeline["phase"]) == {"prefill", "decode"}
    assert list(collect(tmp_path).table["run"]) == ["a", "b"]


def test_a_replayed_run_shows_its_iterations_and_is_never_simulated_again(tmp_path: Path) -> None:
    """A replay's settings hold more than a simulation's: what it did is what it wrote down."""
    record = run(replace(CONFIG, timeline_interval_s=None, record_iterations=True))
    write_run(record, tmp_path / "a")
    settings = tmp_path / "a" / "settings.json"
    extra = {"is_power_measured": True}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | extra))
    results = collect(tmp_path / "a")
    found = series_of(results, choose(results, ())[0])
    assert "from its iterations" in found.note
    assert "num_waiting" not in found.timeline


def test_bins_of_iterations_by_hand() -> None:
    # 600 bins of 0.1 s: two iterations begin in the first, one in the 11th, it ends at 60 s
    rows = pd.DataFrame(
        {
            "phase": "decode", "instance_id": 0, "start_s": [0.0, 0.06, 1.05],
            "duration_s": [0.06, 0.02, 58.95], "batch_size": [2, 4, 5], "tokens": 1,
            "clock_mhz": [1005, 1410, 1200], "energy_j": [12.0, 8.0, 5895.0],
        }
    )  # fmt: skip
    found = from_iterations(rows)
    assert found["time_s"].tolist() == pytest.approx([0.0, 1.0])
    assert found["clock_mhz"].tolist() == [1410, 1200]
    assert found["batch_size"].tolist() == pytest.approx([2.5, 5.0])  # (2·60 + 4·20) / 80
    assert found["power_w"].tolist() == pytest.approx([250.0, 100.0])  # 20 J / 80 ms


def test_a_sketched_run_has_a_report_too(tmp_path: Path) -> None:
    write_run(run(replace(CONFIG, metrics="sketch", timeline_interval_s=None)), tmp_path / "a")
    out = tmp_path / "report.html"
    assert write_report(tmp_path / "a", out, target=0.99, wanted=()) == []
    assert out.stat().st_size > 1e6


def test_savings_are_paired_by_seed() -> None:
    """Seed 2 has twice the energy everywhere: b saves half on each, and not -50 and 75 %."""
    rows = [
        {"policy": p, "rate_rps": 5.0, "seed": s, "energy_j": e * s}
        for p, e in (("a", 100.0), ("b", 50.0))
        for s in (1, 2)
    ]
    made = add_saving(pd.DataFrame(rows), ["rate_rps"], "policy", "a")
    assert made["saving_pct"].tolist() == [0.0, 0.0, 50.0, 50.0]


def test_residency_is_there_wherever_the_results_are_kept(tmp_path: Path) -> None:
    run_sweep(expand(GRID, "test")[:2], tmp_path / "a", jobs=1, store=tmp_path / "elsewhere")
    assert not (tmp_path / "a" / "points").exists()
    results = collect(tmp_path / "a")
    assert set(results.residency) == set(results.table["id"])
    assert all(shares["decode"] for shares in results.residency.values())


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VoltanaError, match=r"needs summary.json .* results.csv"):
        collect(tmp_path)


def chromium() -> str | None:
    """A browser of the system, or the one that playwright installed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    return path if Path(path).exists() else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = chromium()
    if path is None:
        pytest.skip("no chromium: apt-get install chromium, or playwright install chromium")
    # a container may have next to no /dev/shm, and root no sandbox
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=flags, timeout=PATIENCE_MS)
        yield started
        started.close()


class Watched:
    """A page with everything that went wrong in it."""

    def __init__(self, browser: Any, path: Path) -> None:  # noqa: ANN401
        self.page = browser.new_context(
            offline=True, viewport={"width": 1280, "height": 900}
        ).new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.said: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#series .main-svg")

    def column(self, heading: str) -> list[str]:
        """Raw values of the summary's visible rows."""
        found: list[str] = self.page.evaluate(
            """heading => {
                const table = document.getElementById("summary");
                const heads = [...table.tHead.rows[0].cells];
                const i = heads.findIndex(head => head.textContent === heading);
                return [...table.tBodies[0].rows].filter(row => !row.hidden)
                    .map(row => row.cells[i].dataset.value);
            }""",
            heading,
        )
        return found

    def x_ranges(self) -> list[tuple[float, float]]:
        """Range of every horizontal axis of the time series."""
        layout = "document.getElementById('series')._fullLayout"
        return [
            tuple(r)
            for r in self.page.evaluate(
                f"Object.keys({layout}).filter(k => /^xaxis/.test(k)).map(k => {layout}[k].range)"
            )
        ]


@pytest.fixture
def watched(browser: Any, page_file: Path) -> Iterator[Watched]:  # noqa: ANN401
    opened = Watched(browser, page_file)
    yield opened
    opened.page.context.close()
    assert opened.said == []
    assert opened.requested == [page_file.as_uri()]


@pytest.mark.slow
def test_the_page_draws_every_figure_without_errors_or_network(watched: Watched) -> None:
    for chart in ("pareto", "curves", "series", "residency"):
        marks = watched.page.locator(f"#{chart} .trace, #{chart} .bars path").count()
        assert marks >= 3, chart


@pytest.mark.slow
def test_the_table_sorts_by_number_and_by_text(watched: Watched, sweep: Path) -> None:
    table = pd.read_csv(sweep / "results.csv")
    shown = table[~table["policy"].str.startswith("static pair")]
    ascending = sorted(shown["energy_j"] / 1e3)
    heading = watched.page.get_by_role("button", name="energy (kJ)", exact=True)
    heading.click()
    assert np.allclose([float(v) for v in watched.column("energy (kJ)")], ascending, rtol=1e-12)
    heading.click()
    descending = [float(v) for v in watched.column("energy (kJ)")]
    assert np.allclose(descending, ascending[::-1], rtol=1e-12)
    watched.page.get_by_role("button", name="policy", exact=True).click()
    assert watched.column("policy") == sorted(shown["policy"])


@pytest.mark.slow
def test_the_table_filters_and_shows_static_pairs(watched: Watched) -> None:
    watched.page.fill("#search", "ecofreq")
    assert watched.column("policy") == ["ecofreq"] * len(RATES)
    watched.page.fill("#search", "")
    watched.page.check("#pairs")
    assert len(watched.column("policy")) == len(RATES) * (3 + 4)


@pytest.mark.slow
def test_a_drag_zooms_all_rows_and_a_double_click_goes_back(watched: Watched) -> None:
    before = watched.x_ranges()
    assert len(set(before)) == 1
    assert len(before) == 5
    plot = watched.page.locator("#series .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    y = box["y"] + box["height"] / 2
    watched.page.mouse.move(box["x"] + 0.25 * box["width"], y)
    watched.page.mouse.down()
    watched.page.mouse.move(box["x"] + 0.5 * box["width"], y, steps=8)
    watched.page.mouse.up()
    watched.page.wait_for_function(
        "end => document.getElementById('series')._fullLayout.xaxis.range[1] < 0.9 * end",
        arg=before[0][1],
    )
    after = watched.x_ranges()
    assert len(set(after)) == 1
    # a pixel is 1/1100 of the axis
    assert after[0] == pytest.approx((0.25 * before[0][1], 0.5 * before[0][1]), rel=0.02)
    plot.dblclick()
    watched.page.wait_for_function(
        "end => document.getElementById('series')._fullLayout.xaxis.range[1] > 0.99 * end",
        arg=before[0][1],
    )


@pytest.mark.slow
def test_another_run_is_drawn_on_choice(watched: Watched) -> None:
    clocks = "document.getElementById('series')._fullData[0].y"
    first = watched.page.evaluate(f"[...{clocks}]")
    watched.page.select_option("select[data-chart='series']", index=1)
    second = watched.page.evaluate(f"[...{clocks}]")
    assert max(first) == 1410
    assert max(second[-100:]) < 1410
    label = watched.page.locator("select[data-chart='series'] option:checked").text_content()
    assert label.startswith("ecofreq, ")


def test_names_of_runs_and_folders_are_text(tmp_path: Path) -> None:
    """The names of folders come from elsewhere; the browser may see no element in them."""
    name = "<img src=x onerror=alert(1)>&amp;"
    folder = tmp_path / name
    write_run(run(CONFIG), folder / f"{name}1")
    write_run(run(replace(CONFIG, seed=2)), folder / f"{name}2")
    out = tmp_path / "report.html"
    write_report(folder, out, target=0.99, wanted=())
    seen = Elements()
    seen.feed(out.read_text(encoding="utf-8"))
    assert "img" not in seen.tags
    assert f"voltana: {name}" in seen.texts
    assert {f"{name}1", f"{name}2"} <= set(seen.texts)


class Elements(HTMLParser):
    """What an HTML parser makes of a page: names of elements, and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.slow
def test_names_cannot_break_the_page(browser: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """A policy's name goes into HTML and into the script's data; neither may run it."""
    name = "</script><script>console.log('ran')</script>"
    write_run(run(CONFIG), tmp_path / "runs" / "a")
    settings = tmp_path / "runs" / "a" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"controller": name}))
    out = tmp_path / "report.html"
    write_report(tmp_path / "runs", out, target=0.99, wanted=())
    opened = Watched(browser, out)
    assert opened.said == []
    assert name in opened.page.locator("body").inner_text()
