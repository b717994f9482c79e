"""Two run directories in, a report out."""

from __future__ import annotations

import json
from pathlib import Path

from voltana.experiments.draw.validation import validation_figure
from voltana.experiments.runs import cached_profile
from voltana.hwreplay.validate.validate import (
    IterationModel,
    OwnModels,
    ProfileModel,
    Thresholds,
    validate,
)
from voltana.hwreplay.validate.verdict_page import markdown
from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.files import write_figure, write_text
from voltana.profiles.common.folders import claim
from voltana.profiles.places import listed_profiles
from voltana.sim.policies.base import DECODE, PREFILL
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
    model, beyond, own = _models(simulated, profile)
    found = validate(
        simulated, observed, thresholds=thresholds, model=model, beyond=beyond, own=own
    )
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
) -> tuple[IterationModel | None, IterationModel | None, OwnModels]:
    """The profiles' tables, strict and extrapolating; a run of which one is gone goes without."""
    name = profile or simulated.settings.get("profile")
    if name is None:
        return None, None, {}
    try:
        loaded = cached_profile(str(name))
        own = _own_models(simulated) if profile is None else {}
    except VoltanaError:
        if profile is not None:
            raise
        return None, None, {}
    return *_both(loaded, simulated.settings.get("mixed_overlap_frac")), own


def _both(profile: Profile, overlap_frac: float | None = None) -> tuple[ProfileModel, ProfileModel]:
    strict, beyond = (
        ProfileModel(
            profile.truth(extrapolate=goes_on),
            profile.mixed_step(extrapolate=goes_on, overlap_frac=overlap_frac),
        )
        for goes_on in (False, True)
    )
    return strict, beyond


def _own_models(simulated: RunRecord) -> OwnModels:
    """Of the instances of a fleet of unlike cards."""
    found: dict[tuple[str, int], tuple[IterationModel, IterationModel]] = {}
    for phase in (PREFILL, DECODE):
        text = simulated.settings.get(f"{phase}_profiles")
        if text is not None:
            count = simulated.settings[f"num_{phase}"]
            for index, name in enumerate(listed_profiles(text, f"{phase}_profiles", count)):
                found[phase, index] = _both(cached_profile(name))
    return found
