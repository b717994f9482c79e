"""A workload that was written is the one that is read: lengths, prompts and turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.prompts import Prompts
from voltana.sim.workload.traces import open_trace, read_trace


@pytest.mark.parametrize("name", ["w.csv", "w.csv.gz", "w.parquet"])
@pytest.mark.parametrize("kind", ["chat", "agent", "sharegpt"])
def test_it_comes_back_with_prompts_and_turns(tmp_path: Path, kind: str, name: str) -> None:
    made = make_workload(kind, rate_rps=2, duration_s=30, seed=5)
    assert (made.prompts is not None) is (made.turns is not None) is (kind != "sharegpt")
    made.write(tmp_path / name)
    read = open_trace(str(tmp_path / name))
    assert read.content_hash == made.content_hash


def test_a_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "w.csv"
    file.write_text(
        "arrival_s,input_tokens,output_tokens,segments,answer,previous,think_s\n"
        "0.0,300,5,7:200 8:100,1,-1,0\n"
        "0.5,250,0,7:200 9:50,2,-1,0\n"
        "1.0,405,5,7:200 8:100 1:5 4:100,3,0,2.5\n"
    )
    kept = read_trace(file, drop_failed=True)
    assert kept.prompts is not None
    assert kept.turns is not None
    assert kept.prompts.texts() == ["7:200 8:100", "7:200 8:100 1:5 4:100"]
    assert kept.prompts.answers is not None
    assert kept.prompts.answers.tolist() == [1, 3]
    assert (kept.turns.previous.tolist(), kept.turns.think_s.tolist()) == ([-1, 0], [0.0, 2.5])


HEAD = "arrival_s,input_tokens,output_tokens"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{HEAD},segments\n0,10,5,a:10\n", r"pairs name:tokens .*got 'a:10' \(request 0\)"),
        (f"{HEAD},segments\n0,10,5,1:9\n", "must add up to its input_tokens, 10, got 9"),
        (f"{HEAD},segments,answer\n0,10,5,1:10,a\n", r"a segment's name.*got a .*:2\)"),
        (f"{HEAD},segments,answer\n0,10,5,1:10,1\n", "must have one length, got 5 and 10 tokens"),
        (f"{HEAD},previous,think_s\n0,10,5,-1,0\n1,10,5,1,0\n", r"earlier row.*got 1 .*:3\)"),
        (f"{HEAD},previous,think_s\n0,10,5,-1,0\n1,10,5,x,0\n", r"earlier row.*got x .*:3\)"),
        (f"{HEAD},previous,think_s\n0,10,5,-1,0\n1,10,5,0,-3\n", r"think_s must be >= 0, got -3"),
    ],
)
def test_a_wrong_cell_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "w.csv"
    file.write_text(text)
    with pytest.raises(VoltanaError, match=rf"^[^\n]*{words}[^\n]*$"):
        read_trace(file)


def test_texts_are_the_prompts() -> None:
    made = Prompts.of_rows([[3], [], [3, 1]], [[20], [], [20, 5]])
    again = Prompts.of_texts(made.texts())
    assert again.starts.tolist() == made.starts.tolist() == [0, 1, 1, 3]
