from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from experts.local.text import Detokenizer, StopStrings
from tests.experts.models import byte_tokenizer

TOKENIZER = byte_tokenizer()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.integers(0, 8))
def test_pieces_of_text_join_to_it(text: str, context: int) -> None:
    tokens = TOKENIZER(text)["input_ids"]
    before = TOKENIZER("a \u00e9\u20ac"[-context:] if context else "")["input_ids"]
    detokenizer = Detokenizer(TOKENIZER, before)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=100))
def test_bytes_that_are_no_text_join_to_what_the_tokenizer_makes_of_them(tokens: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.finish()
    if len(tokens) < 32:
        assert text == TOKENIZER.decode(tokens)
    assert sum(map(len, text)) <= len(tokens)


def test_a_character_comes_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in TOKENIZER("\u20acx")["input_ids"]] == ["", "", "\u20ac", "x"]


@settings(max_examples=50, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_text_is_let_through_up_to_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    finder = StopStrings(stops)
    out, at = "", 0
    while at < len(text) and not finder.found:
        size = data.draw(st.integers(1, 5))
        out += finder.push(text[at : at + size])
        at += size
    read = text[:at]
    if finder.found:
        assert any(read.startswith(out + stop) for stop in stops)
    else:
        out += finder.finish()
        assert out == read
    assert not any(stop in out for stop in stops)


def test_what_may_become_a_stop_is_held_back() -> None:
    finder = StopStrings(["END", "\n\n"])
    assert [finder.push(piece) for piece in ("a E", "N", "d\n", "x\n", "\n more")] == ["a ", "", "ENd", "\nx", ""]
    assert finder.found
