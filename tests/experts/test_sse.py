from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.sse import EventParser, EventTooLongError

LINES = b'\xef: comment\r\ndata: {"a":1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: \xc3\xa9\r\rdata: last'
EVENTS = [b'{"a":1}', b"two\nlines", "\u00e9".encode(), b"last"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, len(LINES) - 1)))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(LINES)]
    parser = EventParser(1000)
    found = [event for a, b in pairwise(bounds) for event in parser.feed(LINES[a:b])]
    assert found + parser.end() == EVENTS


@pytest.mark.parametrize("piece", [b"x" * 40, b"data: 1234567890\n"])
def test_events_have_a_limit(piece: bytes) -> None:
    parser = EventParser(100)
    with pytest.raises(EventTooLongError):
        [parser.feed(piece) for _ in range(10)]
