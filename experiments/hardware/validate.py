"""Two run directories in, a report out."""

from __future__ import annotations

import json
from pathlib import Path

from voltana.experiments.draw.validation import validation_figure
from voltana.experiments.runs import cached_profile
from voltana.hwreplay.validate.validate import IterationModel, ProfileModel, Thresholds, validate
from voltana.hwreplay.validate.verdict_page import markdown
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_figure, write_text
from voltana.profiles.common.folders import claim
from voltana.sim.records import RunRecord
from voltana.sim.results import finite, read_run, write_json
from voltana.sim.workload.benchmarks import benchmark_file, read_one

NAME = "validation"


def run_validation(
    simulated_dir: Path,
    observed_dir: Path,
    out: Path,
    *,
    thresholds: Thresholds,
    profile: str | None = None,
) -> tuple[bool, str, str]:
    """Compare two run directories and write `validation.{md,png,json}` into `out`.

    Args:
        simulated_dir: The prediction.
        observed_dir: The real run, or what a load generator wrote of it.
        out: Made if missing.
        thresholds: What passes.
        profile: Predicts single iterations; None takes the simulated run's own.

    Returns:
        Whether it passes, the Markdown and the JSON.

    Raises:
        VoltanaError: A run cannot be read, or `profile` was named and cannot be loaded.
    """
    simulated = read_run(simulated_dir)
    observed = _observed(observed_dir, simulated)
    model, beyond = _models(simulated, profile)
    found = validate(simulated, observed, thresholds=thresholds, model=model, beyond=beyond)
    claim(out, "validation")
    figure = validation_figure(simulated, observed, found)
    write_figure(figure, out / f"{NAME}.png", dpi=150)
    text = markdown(
        found,
        simulated=str(simulated_dir),
        observed=str(observed_dir),
        figure=f"{NAME}.png",
    )
    write_text(text, out / f"{NAME}.md")
    write_json(found.as_dict(), out / f"{NAME}.json")
    return found.passes, text, json.dumps(finite(found.as_dict()), indent=1)


def _observed(path: Path, simulated: RunRecord) -> RunRecord:
    """A run directory, or a client's benchmark under the simulated run's promises."""
    if benchmark_file(path) is None:
        return read_run(path)
    return read_one(path).record(simulated.slo_ttft_s, simulated.slo_itl_s)


def _models(
    simulated: RunRecord, profile: str | None
) -> tuple[IterationModel | None, IterationModel | None]:
    """The profile's tables, strict and extrapolating; a run whose profile is gone goes without."""
    name = profile or simulated.settings.get("profile")
    if name is None:
        return None, None
    try:
        loaded = cached_profile(str(name))
    except VoltanaError:
        if profile is not None:
            raise
        return None, None
    overlap = simulated.settings.get("mixed_overlap_frac")
    strict, beyond = (
        ProfileModel(
            loaded.truth(extrapolate=goes_on),
            loaded.mixed_step(extrapolate=goes_on, overlap_frac=overlap),
        )
        for goes_on in (False, True)
    )
    return strict, beyond
