"""The documentation builds without a warning, needs no network and names what there is."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from tests.conftest import ROOT
from voltana.experiments.cli import make_app
from voltana.experiments.documentation.tables import ROUTER, TABLES, table
from voltana.experiments.frontier.search_page import HEADINGS
from voltana.experiments.show import policy_table
from voltana.experiments.study.suite import list_experiments
from voltana.hwreplay.actuator.options import parse_options
from voltana.hwreplay.router.config import RouterConfig
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import KEYS
from voltana.sim.policies import registry
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.slow
def test_it_builds_without_a_warning_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="pip install 'voltana[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix() for p in tmp_path.rglob("*.html")}
    assert {"index.html", "policies.html", "api/policies.html", "nomenclature.html"} <= pages
    loaded = [
        tag
        for page in (tmp_path / "site").rglob("*.html")
        for tag in re.findall(r"<(?:script|img|link)\b[^>]*>", page.read_text(encoding="utf-8"))
        if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag) and "canonical" not in tag
    ]
    assert loaded == []


def test_the_page_on_python_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {"controller": {}, "router": {}})
    page = ROOT / "docs" / "python.md"
    blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.M)
    parsed = doctest.DocTestParser().get_doctest(
        "\n".join(blocks), {"__name__": "page"}, page.name, str(page), 0
    )
    assert len(parsed.examples) > 15
    said: list[str] = []
    results = doctest.DocTestRunner().run(parsed, out=said.append)
    assert results.failed == 0, "".join(said)


def test_tables_show_what_the_code_has() -> None:
    for name, known in (
        ("controllers", CONTROLLERS),
        ("routers", ROUTERS),
        ("scalers", SCALERS),
        ("experiments", list_experiments()),
        ("configuration", KEYS),
    ):
        shown = re.findall(r"^\| `([^`]+)` \|", table(name), flags=re.MULTILINE)
        assert shown == list(known)
    keys = re.findall(r"^\| `([^`]+)` \|", table("router-keys"), flags=re.MULTILINE)
    assert {*keys, *ROUTER} == {item.name for item in fields(RouterConfig)}
    with pytest.raises(VoltanaError, match="no table 'router': did you mean"):
        table("router")


def test_every_mark_names_a_table() -> None:
    for page in PAGES:
        for name in re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8")):
            assert name in TABLES, page


def commands_of(page: Path) -> list[str]:
    """`voltana …` lines of code blocks, continuations joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ {4}(?:\$ |sudo )?(voltana .*)$", text, flags=re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in found]


COMMANDS = [(page.relative_to(ROOT).as_posix(), c) for page in PAGES for c in commands_of(page)]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_in_the_text_exist_with_their_options(page: str, line: str) -> None:
    command: Any = typer.main.get_command(make_app())
    words = shlex.split(line)[1:]
    if words[0] == "actuator":  # whose options are its own
        parse_options(words[0], words[1:])
        return
    while hasattr(command, "commands") and words:
        if words[0].startswith(
            "--"
        ):  # `voltana profile --gpu 0` is `voltana profile measure --gpu 0`
            command = command.commands["measure"]
            break
        assert words[0] in command.commands, f"{page}: no verb {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {line}"


def test_the_readme_names_every_policy() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9-]+)`", text))
    assert named >= {*CONTROLLERS, *ROUTERS, *SCALERS}


def test_the_readme_shows_tables_as_they_are_printed() -> None:
    row = {
        "policy": "static-max", "energy_j": 1.0, "saving_pct": 0.0, "ttft_attainment": 1.0,
        "itl_attainment": 1.0, "energy_per_output_token_j": 0.1, "keeps_slo": True,
    }  # fmt: skip
    printed = policy_table(pd.DataFrame([row]), "title").splitlines()
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert " ".join(printed[1].split()) in text
    headings = " ".join(line for line in HEADINGS if line)
    assert headings in text


def test_commands_of_pages_name_their_python() -> None:
    for page in PAGES:
        assert not re.search(r"^ {4}python ", page.read_text(encoding="utf-8"), re.MULTILINE), page
