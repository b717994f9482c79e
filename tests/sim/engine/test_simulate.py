"""What cannot be simulated is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.schema import Provenance
from voltana.sim.config import make_config
from voltana.sim.engine.simulate import simulate


def test_workloads_and_logs_that_do_not_fit_each_other(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path)
    work = make_requests((0.0, 4, 2))
    exact, sketch = make_config({}), make_config({"metrics": "sketch"})
    empty = replace(work.sliced(5.0, 6.0), name="none")
    need = "a streamed workload and spilled rows need metrics=sketch, got exact"
    none = "workload 'none' has no requests: nothing to simulate"
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: simulate(exact, profile, iter([work])), need),
        (lambda: simulate(exact, profile, work, spill=tmp_path / "rows.parquet"), need),
        (lambda: simulate(exact, profile, empty), none),
        (lambda: simulate(sketch, profile, empty), none),
    ]
    for call, line in cases:
        with pytest.raises(VoltanaError) as caught:
            call()
        assert str(caught.value) == line
    assert list(tmp_path.glob("rows*")) == []


def test_a_profile_imported_without_clocks_takes_no_controller_that_chooses(tmp_path: Path) -> None:
    """One clock, of an import; a card that was measured at one clock has no other, and says so."""
    profile = write_synthetic_profile(tmp_path, clocks_mhz=(1400,))
    stated = {"clock_dependence": Provenance(status="modelled", source="none")}
    imported = replace(
        profile, meta=replace(profile.meta, provenance={**profile.meta.provenance, **stated})
    )
    work = make_requests((0.0, 4, 2))
    for part in ("prefill_controller", "decode_controller"):
        run(profile, work, **{part: "ecofreq:margin=0.1"})
        with pytest.raises(VoltanaError) as caught:
            run(imported, work, **{part: "ecofreq:margin=0.1"})
        assert str(caught.value) == (
            "controller 'ecofreq:margin=0.1' must choose among clocks, and profile "
            f"{profile.name!r} has 1400 MHz alone: import it with --power-from and --clock-shape, "
            "or take static"
        )
        run(imported, work, **{part: "boost"})
        run(imported, work, **{part: "static:f=1400"})
