"""Token ids share what prompts share, counted by a definition of one's own."""

from __future__ import annotations

from itertools import combinations, takewhile

import numpy as np

from voltana.hwreplay.replay.token_ids import TokenIds
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.prompts import Prompts
from voltana.sim.workload.workload import Workload

ANSWER = 3
VOCABULARY = 3, 512


def shared(a: list[int], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def conversations() -> Workload:
    return make_workload("chat:turns=5,think=2,system=40", rate_rps=6.0, duration_s=10.0, seed=13)


def test_two_prompts_share_the_segments_that_both_begin_with_and_no_token_more() -> None:
    work = conversations()
    prompts = work.prompts
    assert prompts is not None
    ids = TokenIds(work, VOCABULARY, seed=13, answer_id=ANSWER)
    sent = [ids.of(i) for i in range(len(work))]
    assert [len(each) for each in sent] == work.input_tokens.tolist()
    assert all(VOCABULARY[0] <= i < VOCABULARY[1] for each in sent for i in each)
    lengths = []
    for a, b in combinations(range(len(work)), 2):
        first, second = prompts.prompt(a), prompts.prompt(b)
        count = shared(first.names, second.names)
        lengths.append(first.ends[count - 1] if count else 0)
        assert shared(sent[a], sent[b]) == lengths[-1]
    assert {0, 40} < {40, *lengths, 0}  # some share more than the service's own prompt


def test_an_answer_in_a_later_prompt_is_what_is_always_answered() -> None:
    work = conversations()
    assert work.prompts is not None
    assert work.prompts.answers is not None
    ids = TokenIds(work, VOCABULARY, seed=13, answer_id=ANSWER)
    seen = 0
    for row in range(len(work)):
        prompt, sent = work.prompts.prompt(row), ids.of(row)
        for name, start, end in zip(prompt.names, [0, *prompt.ends], prompt.ends, strict=False):
            if name in work.prompts.answers:
                assert set(sent[start:end]) == {ANSWER}
                seen += 1
            else:
                assert sent[start] != ANSWER  # else it would be found behind an answer
    assert seen > 10


def test_nothing_is_shared_where_nobody_keeps_prefixes_or_says_what_they_are() -> None:
    work = conversations()
    plain = Workload(
        arrival_s=np.zeros(30), input_tokens=np.full(30, 50), output_tokens=np.ones(30, dtype=int)
    )
    for each, answer_id in ((work, None), (plain, ANSWER)):
        ids = TokenIds(each, VOCABULARY, seed=13, answer_id=answer_id)
        sent = [ids.of(i) for i in range(30)]
        assert max(shared(a, b) for a, b in combinations(sent, 2)) < 4
        again = TokenIds(each, VOCABULARY, seed=13, salt=1, answer_id=answer_id)
        assert again.of(0) != sent[0]


def test_a_vocabulary_too_small_for_all_that_follow_one_prefix_is_used_again() -> None:
    """Two ids beside the answer's for three prompts: the third begins as the first does."""
    rows = "7:4", "8:4", "9:4"
    work = Workload(
        arrival_s=np.zeros(3), input_tokens=np.full(3, 4), output_tokens=np.ones(3, dtype=int),
        prompts=Prompts.of_texts(rows),
    )  # fmt: skip
    ids = TokenIds(work, (3, 6), seed=13, answer_id=ANSWER)
    assert [ids.of(i)[0] for i in range(3)] == [4, 5, 4]
