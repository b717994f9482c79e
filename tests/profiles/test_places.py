"""What a profile of a serving engine tells a simulation, and what of profiles/ is packaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.profiles.synthetic import write_synthetic_profile
from voltana.experiments.cli import make_app
from voltana.profiles.catalog import FILES, list_profiles
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.places import serving_settings
from voltana.sim.config import make_config

HANDOVER_S = 0.014
SERVING = {
    "schema_version": 1,
    "measured": {"status": "measured", "in_s": 0.004, "handover_s": 0.01},
    "simulate": {"first_token": "prefill", "kv_transfer_latency_s": HANDOVER_S},
}
RUN = ("--rate", "1", "--duration", "20", "--prefill", "1", "--decode", "1", "--json")


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A shipped profile with what a serving engine adds."""
    source = ROOT / "profiles/data/a100-80g-sxm/llama-3.1-8b"
    directory = shutil.copytree(source, tmp_path / "served")
    (directory / "serving.toml").write_text(tomli_w.dumps(SERVING))
    return directory


def ttft_p50_s(*options: str) -> float:
    done = CliRunner().invoke(make_app(), ["simulate", *RUN, *options], catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return float(found["ttft_s"]["p50"])


def test_a_profiles_serving_overheads_are_simulated(served: Path) -> None:
    """By name of the profile or of the file; what is set by hand wins."""
    by_hand = ttft_p50_s(
        "--set", "first_token=prefill", "--set", f"kv_transfer_latency_s={HANDOVER_S}"
    )
    without = ttft_p50_s("--set", "first_token=prefill")
    assert by_hand == pytest.approx(without + HANDOVER_S, rel=0.05)
    assert ttft_p50_s("--profile", str(served)) == by_hand
    assert ttft_p50_s("--config", str(served / "serving.toml")) == by_hand
    zero = ("--set", "kv_transfer_latency_s=0")
    assert ttft_p50_s("--profile", str(served), *zero) == without


def test_a_configuration_that_was_written_whole_is_read_as_it_is(served: Path) -> None:
    kept = make_config({"profile": str(served), "kv_transfer_latency_s": 0.0}).as_dict()
    assert make_config(kept).kv_transfer_latency_s == 0.0
    assert serving_settings("a100-80g-sxm/llama-3.1-8b") == {}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"schema_version": 2, "simulate": {}}, "schema_version 1"),
        ({"schema_version": 1}, "schema_version 1"),
        ({"schema_version": 1, "simulate": {"kv_latency": 1}}, "unknown key 'kv_latency'"),
    ],
)
def test_a_serving_file_of_another_kind_is_refused(
    tmp_path: Path, table: dict[str, Any], said: str
) -> None:
    write_synthetic_profile(tmp_path)
    (tmp_path / "serving.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(VoltanaError, match=said) as found:
        make_config({"profile": str(tmp_path)})
    assert "serving.toml" in str(found.value)


IMPORT_TABLES = (
    "systems", "host", "power/h100", "power/b200", "power/rtx-pro-6000", "clocks/a100",
    "clocks/rtx-pro-6000",
)  # fmt: skip
"""What `voltana profile import` reads beside the kernel tables."""


def test_a_wheel_holds_the_shipped_tables_and_no_stray_profile(tmp_path: Path) -> None:
    """By the build backend itself, on a tree where profiles were measured into the package."""
    wheels = pytest.importorskip("hatchling.builders.wheel")
    for folder in ("voltana", "sim", "profiles", "hwreplay", "experiments"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shipped = tmp_path / "profiles/data/a100-80g-sxm/llama-3.1-8b"
    for stray in (tmp_path / "profiles/cpu", shipped):
        (stray / "logs").mkdir(parents=True)
        (stray / "report").mkdir()
        for name in ("journal.jsonl", "logs/engine.log", "report/energy_u.png", "report/fit.csv"):
            (stray / name).write_text("stray")
    for name in FILES:
        (tmp_path / "profiles/cpu" / name).write_text("stray")
    files = wheels.WheelBuilder(str(tmp_path)).recurse_included_files()
    found = {file.distribution_path for file in files}
    data = {
        path for path in found if path.startswith("voltana/profiles/") and not path.endswith(".py")
    }
    names = (*FILES, "states.toml")
    tables = {f"voltana/profiles/data/{name}/{file}" for name in list_profiles() for file in names}
    imported = {f"voltana/profiles/importing/data/{name}.toml" for name in IMPORT_TABLES}
    assert data == tables | imported | {"voltana/profiles/data/a100-80g-sxm/coefficients.toml"}
    some = ("profiles/catalog.py", "sim/config.py", "hwreplay/engines/sglang/install.sh")
    assert {f"voltana/{path}" for path in some} <= found
