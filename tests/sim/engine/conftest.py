"""A profile whose times can be added up by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.profiles.synthetic import write_synthetic_profile
from voltana.profiles.catalog import Profile


@pytest.fixture
def linear(tmp_path: Path) -> Profile:
    """A prefill or chunk takes 1/8 s and 1/1024 s a token whatever attention there is, a decode
    step 1/2 s; 256 W busy, 64 W at rest."""
    return write_synthetic_profile(
        tmp_path,
        time_s=lambda phase, f, b, t: 0.125 + t / 1024 if phase == "prefill" else 0.5,
        power_w=lambda phase, f, b, t: 256.0,
        idle_w=lambda f: 64.0,
    )
