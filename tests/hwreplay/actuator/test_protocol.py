"""Sixteen bytes, and nothing that is not a message passes for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana.hwreplay.messages.actuation import (
    SIZE,
    Answer,
    Operation,
    ProtocolError,
    Request,
    Status,
    parse_answer,
    parse_request,
)

NUMBERS = {
    "gpu": st.integers(0, 2**16 - 1),
    "value": st.integers(0, 2**32 - 1),
    "sequence": st.integers(0, 2**32 - 1),
}


def test_layout_by_hand() -> None:
    request = Request(operation=Operation.LOCK, gpu=2, value=1005, sequence=7)
    assert request.pack() == b"VOLT\x01\x03\x02\x00\xed\x03\x00\x00\x07\x00\x00\x00"
    assert SIZE == len(request.pack()) == 16


@given(st.builds(Request, operation=st.sampled_from(Operation), **NUMBERS))
def test_requests_come_back(request: Request) -> None:
    assert parse_request(request.pack()) == request


@given(st.builds(Answer, status=st.sampled_from(Status), **NUMBERS))
def test_answers_come_back(answer: Answer) -> None:
    assert parse_answer(answer.pack()) == answer


@given(st.binary(max_size=40) | st.binary(min_size=10, max_size=10).map(lambda b: b"VOLT\1\3" + b))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        request = parse_request(data)
    except ProtocolError:
        return
    assert request.pack() == data


@pytest.mark.parametrize("code", [0, 7, 255])
def test_an_unknown_operation_is_refused(code: int) -> None:
    with pytest.raises(ProtocolError, match=f"got {code}"):
        parse_request(struct.pack("<4sBBHII", b"VOLT", 1, code, 0, 0, 0))
