"""The real SGLang on this CPU: prefill on one server, decode on the other, KV over loopback."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hwreplay.launch import HOST, Server, run_fleet
from profiles.errors import VoltanaError

ENGINE = Path(__file__).parents[2] / ".engine"
OUTPUT_TOKENS = 12


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    with run_fleet(ENGINE, tmp_path_factory.mktemp("engine")) as servers:
        yield servers


def generate(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://{HOST}:{server.port}/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def through(pair: list[Server], prompt: list[int], room: int) -> tuple[list[int], list[int]]:
    """Output ids of the prefill server and of the decode server for one prompt."""
    prefill, decode = pair
    body = {
        "input_ids": prompt,
        "sampling_params": {
            "temperature": 0.0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True
        },
        "bootstrap_host": HOST,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": room,
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda server: generate(server, body), (prefill, decode)))
    return answers[0]["output_ids"], answers[1]["output_ids"]


@pytest.mark.engine
@pytest.mark.slow
def test_pair_transfers_the_cache(pair: list[Server]) -> None:
    first = through(pair, list(range(3, 67)), room=1)
    other = through(pair, list(range(103, 167)), room=2)
    again = through(pair, list(range(3, 67)), room=3)
    assert len(first[0]) == 1
    assert len(first[1]) == OUTPUT_TOKENS
    assert first[1][0] == first[0][0]
    assert again == first
    assert other[1] != first[1]


def test_without_an_installation_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(VoltanaError, match="run `make engine`"), run_fleet(tmp_path, tmp_path):
        pass
