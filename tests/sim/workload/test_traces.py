"""Readers of published formats: every format, every bad input."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.fetch import NamedTrace, named_trace
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.traces import open_trace, read_trace

FORMATS = {
    "azure2023.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,396,109\n",
    "azure2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:01.509930+00:00,396,109\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,374,44,418,Conversation log\n6.5,GPT-4,396,109,505,API log\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [1]}'
    "\n"
    '{"timestamp": 1500, "input_length": 396, "output_length": 109, "hash_ids": [2]}\n',
    "plain.csv": "arrival_s,input_tokens,output_tokens\n0.0,374,44\n1.5,396,109\n",
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_each_format_gives_the_same_requests(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMATS[name])
    workload = read_trace(tmp_path / name)
    assert workload.arrival_s == pytest.approx([0.0, 1.5], abs=1e-9)
    assert workload.input_tokens.tolist() == [374, 396]
    assert workload.output_tokens.tolist() == [44, 109]


@pytest.mark.parametrize("name", ["w.csv", "w.csv.gz", "w.parquet"])
def test_written_workloads_read_back_equal(tmp_path: Path, name: str) -> None:
    made = make_workload("sharegpt", rate_rps=50, duration_s=10, seed=3)
    made.write(tmp_path / name)
    assert read_trace(tmp_path / name).content_hash == made.content_hash


HEAD = "arrival_s,input_tokens,output_tokens\n0.0,10,10\n"
BAD = {
    "negative length": (HEAD + "1.0,-5,10\n", r"input_tokens must be >= 1.*got -5 \(.*t.csv:3\)"),
    "zero output": (HEAD + "1.0,5,0\n", r"output_tokens must be >= 1.*got 0 \(.*:3\)"),
    "NaN": (HEAD + "1.0,,7\n", r"input_tokens must be a whole number, got nan \(.*:3\)"),
    "text": (HEAD + "1.0,many,7\n", r"input_tokens must be a whole number, got many \(.*:3\)"),
    "fraction": (HEAD + "1.0,2.5,7\n", r"input_tokens must be a whole number, got 2.5 \(.*:3\)"),
    "unsorted": (HEAD + "2.0,5,5\n1.0,5,5\n", r"arrival_s must not fall.*got 1.0 \(.*:4\).*"),
    "negative time": (HEAD + "-1.0,5,5\n", r"arrival_s must be >= 0, got -1.0 \(.*:3\)"),
    "time is no number": (HEAD + "soon,5,5\n", r"arrival_s must be a finite number.*got soon"),
    "blank line": (HEAD + "\n1.0,5,5\n", r"arrival_s must be a finite number.*\(.*:3\)"),
    "wrong columns": ("time,in,out\n1,2,3\n", r"t.csv:1: columns time, in, out are of no known"),
    "no rows": ("arrival_s,input_tokens,output_tokens\n", "holds no requests"),
    "empty": ("", "cannot read"),
    "bad date": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,1,1\nlater,1,1\n",
        r"TIMESTAMP must be a date and time, got later \(.*:3\)",
    ),
    "burst failure": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,G,3,0,3,API log\n",
        r"Response tokens must be >= 1 \(trace_drop_failed=true leaves out.*got 0",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_names_file_line_and_column(tmp_path: Path, case: str) -> None:
    text, words = BAD[case]
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(VoltanaError, match=words) as caught:
        read_trace(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def test_failed_requests_are_left_out_only_on_demand(tmp_path: Path) -> None:
    text = FORMATS["burst.csv"] + "7,GPT-4,1,0,1,API log\n"
    (tmp_path / "b.csv").write_text(text)
    assert len(read_trace(tmp_path / "b.csv", drop_failed=True)) == 2


def test_truncated_gzip_missing_file_and_unknown_format(tmp_path: Path) -> None:
    whole = gzip.compress(FORMATS["plain.csv"].encode() * 200)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VoltanaError, match="cannot read"):
        read_trace(tmp_path / "cut.csv.gz")
    with pytest.raises(VoltanaError, match="no such trace file"):
        open_trace(str(tmp_path / "nowhere.csv"))
    with pytest.raises(VoltanaError, match="did you mean 'azure-conv-2023'"):
        open_trace("azure-conv")


def test_real_traces_read_whole(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row counts and spans as their source page states them."""
    monkeypatch.setenv("VOLTANA_DATA", str(shared_data))
    conversation = open_trace("azure-conv-2023")
    assert len(conversation) == 19_366
    assert conversation.duration_s == pytest.approx(3501.7, abs=0.1)
    assert len(open_trace("azure-code-2023")) == 8_819
    assert len(open_trace("mooncake-conversation")) == 12_031


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """A file on a loopback web server."""
    body = FORMATS["plain.csv"].encode()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "plain.csv").write_bytes(body)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/plain.csv", body
        server.shutdown()
        thread.join()


def test_download_is_checked(
    served: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, body = served
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VOLTANA_DATA", raising=False)
    right = hashlib.sha256(body).hexdigest()

    def entry(name: str, where: str, sha256: str) -> dict[str, NamedTrace]:
        return {name: NamedTrace(url=where, sha256=sha256, licence="-", citation="-")}

    path = named_trace("good", entry("good", url, right))
    assert path.read_bytes() == body
    with pytest.raises(VoltanaError, match="is not the published file"):
        named_trace("bad", entry("bad", url, "0" * 64))
    with pytest.raises(VoltanaError, match=r"cannot download off .*set VOLTANA_DATA"):
        named_trace("off", entry("off", "http://127.0.0.1:9/x.csv", right))
    with pytest.raises(VoltanaError, match="unknown trace"):
        named_trace("other", entry("good", url, right))


def test_a_local_file_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = FORMATS["plain.csv"].encode()
    right = hashlib.sha256(body).hexdigest()
    trace = NamedTrace(
        url="http://127.0.0.1:9/there.csv", sha256="0" * 64, licence="-", citation="-",
        plain_name="plain.csv", plain_sha256=right,
    )  # fmt: skip
    monkeypatch.setenv("VOLTANA_DATA", str(tmp_path))
    (tmp_path / "plain.csv").write_bytes(body)
    assert named_trace("it", {"it": trace}) == tmp_path / "plain.csv"
    (tmp_path / "plain.csv").write_bytes(body + b"9,9,9\n")
    with pytest.raises(VoltanaError, match=r"plain\.csv is not the published file"):
        named_trace("it", {"it": trace})


def test_a_workload_cannot_be_made_of_nonsense() -> None:
    good = make_workload("lmsys", rate_rps=5, duration_s=2, seed=0)
    with pytest.raises(VoltanaError, match="must not fall"):
        replace(good, arrival_s=good.arrival_s[::-1], name="reversed")
    with pytest.raises(VoltanaError, match="one length"):
        replace(good, arrival_s=np.zeros(3))


def test_rows_longer_than_the_header_are_refused_and_do_not_shift_columns(tmp_path: Path) -> None:
    """pandas would take the first field as an index and read every column one too far left."""
    path = tmp_path / "long.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,5,6,7\n1,5,6,7\n")
    with pytest.raises(VoltanaError, match=r"more fields than the header names"):
        read_trace(path)


def test_absurd_length_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,5,6\n1,1e30,7\n")
    with pytest.raises(VoltanaError, match=r"input_tokens must be <= .*huge\.csv:3"):
        read_trace(path)


def test_left_out_requests_are_counted_in_the_name(tmp_path: Path) -> None:
    path = tmp_path / "zero.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,5,6\n1,5,0\n2,5,0\n")
    workload = read_trace(path, drop_failed=True)
    assert len(workload) == 1
    assert "2 of 3 without output left out" in workload.name
    path.write_text("arrival_s,input_tokens,output_tokens\n1,5,0\n")
    with pytest.raises(VoltanaError, match="no request with output"):
        read_trace(path, drop_failed=True)


def test_late_mooncake_timestamps_stay_milliseconds(tmp_path: Path) -> None:
    """pandas turns a column called timestamp into dates once all its values are large."""
    path = tmp_path / "late.jsonl"
    row = '{{"timestamp": {}, "input_length": 5, "output_length": 6}}\n'
    path.write_text(row.format(40_000_000) + row.format(40_003_000))
    assert read_trace(path).arrival_s.tolist() == pytest.approx([40_000.0, 40_003.0], rel=1e-12)
