"""The engine's plug-in and its reader agree, and the plug-in harms nobody."""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from voltana.hwreplay.messages.batch_feed import (
    ENVIRONMENT,
    LAYOUT,
    BatchFeed,
    NoticeKind,
    parse_notice,
)
from voltana.profiles.common.errors import VoltanaError

PLUGIN = ROOT / "hwreplay/engines/sglang/observer/voltana_engine_observer.py"


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("voltana_engine_observer", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's ranks of this process, as 0.5.23 names them."""
    found = SimpleNamespace(attn_tp_rank=0, pp_rank=0, pp_size=1)
    context = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: found  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    return found


def batch(mode: str, **values: object) -> SimpleNamespace:
    """The names of SGLang's ScheduleBatch that the plug-in reads."""
    modes = {f"is_{name}": (lambda name=name: name == mode) for name in
             ("extend", "mixed", "prebuilt", "idle")}  # fmt: skip
    return SimpleNamespace(forward_mode=SimpleNamespace(**modes), **values)


PREFILL = batch("extend", batch_size=lambda: 3, extend_num_tokens=700)
DECODE = batch("decode", batch_size=lambda: 2, seq_lens_cpu=np.array([40, 60]))
MIXED = batch(
    "mixed", batch_size=lambda: 5, extend_num_tokens=702, decoding_reqs=["a", "b"],
    seq_lens_cpu=np.array([300, 300, 100, 40, 60]),
)  # fmt: skip
"""Three prompts of 700 new tokens, and two requests that decode, at the end and a token each."""
SCHEDULER = SimpleNamespace(waiting_queue=[1, 2, 3, 4])


def test_both_sides_agree(plugin: ModuleType) -> None:
    assert plugin.ENVIRONMENT == ENVIRONMENT
    assert plugin.LAYOUT.format == LAYOUT.format
    assert tuple(NoticeKind) == (plugin.HELLO, plugin.PREFILL, plugin.DECODE, plugin.MIXED)


def test_hello_then_batches(plugin: ModuleType, tmp_path: Path) -> None:
    feed = BatchFeed(tmp_path / "b")
    announcer = plugin.Announcer(str(tmp_path / "b"))
    before_ns = time.monotonic_ns()
    for item in (PREFILL, DECODE, MIXED, batch("idle"), batch("prebuilt")):
        announcer.announce(SCHEDULER, item)
    notices = [feed.receive() for _ in range(5)]
    assert notices[4] is None
    found = [(n.kind, n.num_requests, n.tokens, n.num_waiting) for n in notices if n]
    assert found == [
        (NoticeKind.HELLO, 0, 0, 0),
        (NoticeKind.PREFILL, 3, 700, 4),
        (NoticeKind.DECODE, 2, 100, 4),
        (NoticeKind.MIXED, 2, 100, 4),
    ]
    chunks = [(n.chunk_requests, n.chunk_tokens) for n in notices if n]
    assert chunks == [(0, 0), (0, 0), (0, 0), (3, 700)]
    assert all(before_ns <= n.sent_ns <= time.monotonic_ns() for n in notices if n)
    feed.close()
    announcer.close()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("attn_tp_rank", "pp_rank", "pp_size", "num_notices"),
    [(0, 0, 1, 2), (1, 0, 1, 0), (3, 0, 1, 0), (0, 0, 2, 0), (0, 1, 2, 2), (1, 1, 2, 0)],
)
def test_one_rank_announces_for_all(
    plugin: ModuleType,
    ranks: SimpleNamespace,
    tmp_path: Path,
    attn_tp_rank: int,
    pp_rank: int,
    pp_size: int,
    num_notices: int,
) -> None:
    """Else a batch of a tensor-parallel server would count as many times as it has cards."""
    ranks.attn_tp_rank, ranks.pp_rank, ranks.pp_size = attn_tp_rank, pp_rank, pp_size
    feed = BatchFeed(tmp_path / "b")
    announcer = plugin.Announcer(str(tmp_path / "b"))
    announcer.announce(SCHEDULER, PREFILL)
    found = [notice for _ in range(3) if (notice := feed.receive()) is not None]
    assert len(found) == num_notices
    feed.close()
    announcer.close()


def test_no_reader_a_full_socket_and_a_strange_batch_are_survived(
    plugin: ModuleType, tmp_path: Path
) -> None:
    announcer = plugin.Announcer(str(tmp_path / "b"))
    announcer.announce(SCHEDULER, PREFILL)  # nobody there
    feed = BatchFeed(tmp_path / "b")
    announcer.announce(SCHEDULER, SimpleNamespace())
    for _ in range(20_000):  # nobody reads: the kernel's buffer is full long before
        announcer.announce(SCHEDULER, PREFILL)
    first = feed.receive()
    assert first is not None
    assert first.kind == NoticeKind.HELLO
    feed.close()
    announcer.close()


def test_the_socket_of_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(tmp_path / "b"))
    feed = BatchFeed(tmp_path / "b")
    feed.close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VoltanaError, match="cannot bind"):
        BatchFeed(tmp_path / "file")


@given(st.binary(max_size=40) | st.binary(min_size=24, max_size=24).map(lambda b: b"VBAT\2\1" + b))
def test_any_bytes_are_a_notice_or_refused(data: bytes) -> None:
    try:
        notice = parse_notice(data)
    except VoltanaError:
        return
    assert LAYOUT.pack(
        b"VBAT", 2, notice.kind, notice.num_requests, notice.tokens, notice.num_waiting,
        notice.sent_ns, notice.chunk_requests, notice.chunk_tokens,
    ) == data  # fmt: skip


def test_a_wrong_datagram_is_refused_by_the_feed(tmp_path: Path) -> None:
    feed = BatchFeed(tmp_path / "b")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"x" * LAYOUT.size, str(tmp_path / "b"))
    with pytest.raises(VoltanaError, match="must begin"):
        feed.receive()
    feed.close()
