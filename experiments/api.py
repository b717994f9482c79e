"""What `import voltana` offers: a function a verb of the command line, with the same words.

Keys of a configuration (`voltana simulate --help` lists them) are keyword arguments, in SI units:
`slo_itl_s=0.045`. What a function is not told has the command line's default. Nothing is printed.
Results of many runs are pandas tables, as in the files that the commands write; without `out` they
are kept in no file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from voltana.experiments.compare.policies import TARGET, keeps_promise
from voltana.experiments.runs import profile_of, workload_of
from voltana.experiments.show import summary_table
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.folders import claim
from voltana.sim.config import SimConfig, make_config, read_toml
from voltana.sim.engine.simulate import simulate as run_engine
from voltana.sim.metrics import summarise
from voltana.sim.records import STATUS_NAMES, RunRecord
from voltana.sim.results import refuse_existing, write_run
from voltana.sim.workload.workload import Workload

__all__ = ["Run", "frontier", "recommend", "simulate", "sweep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One simulated run."""

    config: SimConfig
    record: RunRecord
    """All that was kept of it: requests, token gaps, instances, timeline."""

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Every metric by its name in NOMENCLATURE.md, in SI units; times are tables of levels."""
        return summarise(self.record)

    @property
    def energy_j(self) -> float:
        """All instances' GPUs from the first moment to the last, in J."""
        return float(self.summary["energy_j"])

    @property
    def energy_per_output_token_j(self) -> float:
        """J a token of completed requests."""
        return float(self.summary["energy_per_output_token_j"])

    @property
    def ttft_attainment(self) -> float:
        """Share of requests whose first token came within the promise."""
        return float(self.summary["ttft_attainment"])

    @property
    def itl_attainment(self) -> float:
        """Share of gaps between tokens within the promise."""
        return float(self.summary["itl_attainment"])

    def keeps_slo(self, target: float = TARGET) -> bool:
        """Whether both attainments reach the target."""
        return keeps_promise(self.summary, target)

    def requests(self) -> pd.DataFrame:
        """One row a request: lengths, instances, arrival, first token and end in s, status."""
        table = self.record.requests
        columns = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
        frame = pd.DataFrame({name: c for name, c in columns.items() if c is not None})
        return frame.assign(status=[STATUS_NAMES[s] for s in frame["status"]])

    def timeline(self) -> pd.DataFrame:
        """Clock, batch, queue, KV tokens and power of each instance over time.

        Raises:
            VoltanaError: The run kept none.
        """
        if self.record.timeline is None:
            raise VoltanaError("the run kept no timeline: simulate it with timeline_interval_s=0.1")
        return pd.DataFrame(dict(self.record.timeline))

    def write(self, directory: str | Path) -> Path:
        """Write the run directory that `voltana report` and `validate` read.

        Raises:
            VoltanaError: It holds a run already, or something else.
        """
        refuse_existing(Path(directory))
        write_run(self.record, Path(directory))
        return Path(directory)

    def __str__(self) -> str:
        return summary_table(self.config, self.summary)


def simulate(
    config: SimConfig | str | Path | None = None,
    *,
    profile: Profile | str | Path | None = None,
    workload: Workload | str | Path | None = None,
    **settings: object,
) -> Run:
    """Simulate one configuration.

    Args:
        config: A configuration, or a TOML file of its keys; by default every key has its default.
        profile: A loaded one, a shipped one's name, or a directory; replaces the configuration's.
        workload: Requests as they are, the name of a length distribution, or a file of lengths.
        settings: Any other configuration key, over those of `config`.

    Raises:
        VoltanaError: An unknown key (the nearest is suggested), or a value that breaks a rule.

    Example:
        >>> run = simulate(rate_rps=5, duration_s=4, controller="static", router="round-robin")
        >>> int(run.summary["requests_completed"]), run.keeps_slo()
        (20, True)
    """
    given = dict(settings)
    if profile is not None:
        given["profile"] = _name_of(profile)
    if isinstance(workload, str | Path):
        given["workload"] = str(workload)
    made = _config(config, given)
    truth = profile if isinstance(profile, Profile) else profile_of(made)
    requests = workload if isinstance(workload, Workload) else workload_of(made)
    return Run(config=made, record=run_engine(made, truth, requests))


def sweep(
    grid: Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
) -> pd.DataFrame:
    """Run every point of a grid.

    Args:
        grid: A sweep file, or the same as a dictionary: `base`, `grid`, `static_pairs`; see
            `voltana.experiments.sweep.grid`.
        out: Folder of the results, which an interrupted sweep goes on in.
        jobs: Processes; all cores by default.

    Returns:
        One row a point: its labels, its configuration, and every number of its summary.

    Raises:
        VoltanaError: An unknown key or a bad value, or some points failed.
    """
    from voltana.experiments.sweep.grid import expand, read_sweep
    from voltana.experiments.sweep.run import run_sweep

    points = expand(grid, "sweep") if isinstance(grid, Mapping) else read_sweep(Path(grid))
    with _folder(out) as directory:
        return run_sweep(points, directory, jobs=jobs)


def frontier(
    file: str | Path | None = None,
    *,
    rates_rps: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    target: float | None = None,
    attainment: str | None = None,
    seeds: int | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    **settings: object,
) -> pd.DataFrame:
    """Find each policy's least energy at equal attainment, beside the best fixed clocks.

    Args:
        file: A frontier file; without one the next three say what is compared.
        rates_rps: Loads; one of 30 requests/s by default.
        policies: Texts 'controller + router', the knob marked as in `ecomin:headroom={0.5..0}`.
        target: Share of requests that keep the promise; by default the file's, or 0.99.
        attainment: Which share: attainment, ttft_attainment, itl_attainment or worse.
        seeds: Judging repeats; 5 by default.
        out: Folder of the runs, tables and figure.
        jobs: Processes; all cores by default.
        settings: Configuration keys that all runs share.

    Returns:
        One row a load, router, controller and knob; the columns are explained at
        `voltana.experiments.frontier.table.COLUMNS`.

    Raises:
        VoltanaError: A bad value, a key that loads or policies set themselves, or no run ended.
    """
    from voltana.experiments.frontier.search import search_frontier
    from voltana.experiments.frontier.search_page import write_frontier
    from voltana.experiments.frontier.study import quick_study, read_study
    from voltana.experiments.frontier.table import frontier_table

    if file is None:
        study = quick_study(settings, rates_rps, policies, seeds, target, attainment)
        question = ""
    elif rates_rps or policies or seeds:
        raise VoltanaError(
            f"rates_rps, policies and seeds are for a search without a file: edit {file}"
        )
    else:
        study, question = read_study(
            Path(file), settings=settings, target=target, attainment=attainment
        )
    with _folder(out) as directory:
        claim(directory, "frontier")
        done = {load.name: row for load, row in search_frontier(study, directory, jobs=jobs)}
        found = {load.name: done[load.name] for load in study.loads}
        frame = pd.concat(
            [frontier_table(study, row, directory, jobs) for row in found.values()],
            ignore_index=True,
        )
        if out is not None:
            write_frontier(study, found, frame, directory, question)
    return frame


def recommend(
    profile: str | Path | None = None,
    *,
    gpus: int | None = None,
    watts: float | None = None,
    target: float = TARGET,
    policies: Sequence[str] = (),
    caps: bool = False,
    uncertainty: int = 10,
    seeds: int = 5,
    out: str | Path | None = None,
    jobs: int | None = None,
    **settings: object,
) -> Mapping[str, Any]:
    """Recommend clocks, instances and a policy for a load, its promises and some GPUs.

    Args:
        profile: A shipped one's name or a directory.
        gpus: How many there are; by default as many as the watts allow, 16 at most.
        watts: What all of them may draw at once; no limit by default.
        target: Share of requests that keep both promises.
        policies: Dynamic ones, as of `frontier`.
        caps: Search power caps, too.
        uncertainty: Draws from the profile's stated errors; 0: none.
        seeds: Repeats that judge.
        out: Folder of runs, page, figure and ready-made files.
        jobs: Processes; all cores by default.
        settings: Configuration keys of the load and its promises.

    Returns:
        The advice as `voltana recommend --json` prints it: `is_worth_it`, `best`, `ways`, …

    Raises:
        VoltanaError: A key that is the search's own, a bad value, or too little hardware.
    """
    from voltana.experiments.recommend.run import recommend_all
    from voltana.experiments.recommend.show import Costs

    with _folder(out) as directory:
        found = recommend_all(
            [] if profile is None else [str(profile)], settings, directory, Costs(), gpus=gpus,
            watts=watts, target=target, policies=policies, seeds=seeds, draws=uncertainty,
            is_capped=caps, jobs=jobs,
        )  # fmt: skip
    advice: Mapping[str, Any] = found.told["advices"][0]
    return advice


def _config(config: SimConfig | str | Path | None, given: Mapping[str, object]) -> SimConfig:
    if isinstance(config, SimConfig):
        return make_config({**config.as_dict(), **given})
    if config is None:
        return make_config(given)
    return make_config({**read_toml(Path(config)), **given}, where=str(config))


def _name_of(profile: Profile | str | Path) -> str:
    if isinstance(profile, Profile):
        return profile.name if profile.directory is None else str(profile.directory)
    return str(profile)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder that was named, or one that goes when the work is done."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="voltana-") as name:
        yield Path(name) / "kept"
