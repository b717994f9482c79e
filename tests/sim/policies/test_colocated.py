"""Rules for instances of both phases, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.policies.fixtures import CLOCKS, make_context
from voltana.profiles.common.errors import VoltanaError
