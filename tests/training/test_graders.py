"""Graders against answers as models really phrase them, and properties that hold for any text."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import GradeError
from training.graders import (
    GRADERS,
    GraderName,
    chosen_letter,
    contains,
    exact,
    f1,
    grade,
    judge_messages,
    judge_quality,
    last_number,
)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("Paris", "paris", True),
        (' "Paris." ', "Paris", True),
        ("**Paris**", "Paris", True),
        ("the  big\napple", "The big apple", True),
        ("-3", "3", False),
        ("1.5", "15", False),
        ("ﬁn", "fin", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_exact(response: str, answer: str, right: bool) -> None:
    assert exact(response, answer) == right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("It is Paris, of course.", "Paris", True),
        ("Comparison", "Paris", False),
        ("the total is 142", "42", False),
        ("the total is 42.", "42", True),
        ("use f(x) = x+1 here", "f(x) = x+1", True),
        ("", "x", False),
    ],
)
def test_contains(response: str, answer: str, right: bool) -> None:
    assert contains(response, answer) == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("#### 1,234", 1234),
        ("$1,234,567.89 in all", 1234567.89),
        ("so 7-3", 3),
        ("so -3", -3),
        ("it is −3 °C", -3),
        ("5 apples, then 6 more, 11 in total", 11),
        ("about .5 litres", 0.5),
        ("2.5e-3", 0.0025),
        ("1,2,3", 3),
        ("12,34", 34),
        ("\\boxed{18}", 18),
        ("(20)", 20),
        ("70%", 70),
        ("v2", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_tolerance() -> None:
    assert grade("numeric", "3.14159", ["3.1416"]) == 1
    assert grade("numeric", "3.15", ["3.1416"]) == 0
    assert grade("numeric", "no idea", ["3"]) == 0


@given(st.integers(-(10**12), 10**12))
def test_numeric_reads_what_python_writes(value: int) -> None:
    assert last_number(f"After 3 steps the result is {value:,}.") == value
    assert last_number(f"= {value}") == value


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_numeric_reads_any_float(value: float) -> None:
    assert last_number(f"x = {value!r}") == value


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B) a dog", "B"),
        ("A. Because a dog barks", "A"),
        ("The answer is (B).", "B"),
        ("The correct answer is: **C**", "C"),
        ("Answer: D", "D"),
        ("\\boxed{\\text{E}}", "E"),
        ("Option A is wrong. Option B too. So the answer is C", "C"),
        ("(A) is false, (B) is false, (D) holds", "D"),
        ("I think it is B", "B"),
        ("A dog barks", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_choice(response: str, letter: str | None) -> None:
    assert chosen_letter(response) == letter


@given(
    st.sampled_from("ABCDEFGHIJ"),
    st.sampled_from(["The answer is {}.", "{}", "({})", "Answer: {}", "answer is **{}**"]),
)
def test_choice_finds_every_letter(letter: str, form: str) -> None:
    assert chosen_letter(form.format(letter)) == letter


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("the cat sat", "a cat sat", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
        ("The U.S.A.", "USA", 1.0),
    ],
)
def test_f1(response: str, answer: str, score: float) -> None:
    assert f1(response, answer) == pytest.approx(score)


@given(st.text(), st.text())
def test_f1_is_a_symmetric_share(one: str, other: str) -> None:
    assert f1(one, other) == f1(other, one)
    assert 0 <= f1(one, other) <= 1


@given(st.sampled_from(sorted(GRADERS)), st.text(), st.text())
def test_every_grade_is_a_share(grader: GraderName, response: str, answer: str) -> None:
    try:
        quality = grade(grader, response, [answer])
    except GradeError:
        assert grader in ("numeric", "choice")
    else:
        assert 0 <= quality <= 1


@given(st.sampled_from(["exact", "f1"]), st.text())
def test_an_answer_is_right_by_itself(grader: GraderName, text: str) -> None:
    assert grade(grader, text, [text]) == 1


def test_best_of_several_answers() -> None:
    assert grade("exact", "NYC", ["New York", "NYC"]) == 1
    assert grade("f1", "york", ["New York", "NYC"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("grader", "answers", "message"),
    [
        ("exact", [], "needs a right answer"),
        ("numeric", ["many"], "holds no number"),
        ("choice", ["maybe"], "not a letter"),
        ("judge", ["x"], "is not one of"),
    ],
)
def test_what_cannot_be_graded_is_refused(grader: GraderName, answers: list[str], message: str) -> None:
    with pytest.raises(GradeError, match=message):
        grade(grader, "whatever", answers)


@pytest.mark.parametrize(
    ("reply", "quality"),
    [
        ('{"reason": "right", "score": 9}', 0.9),
        ('```json\n{"reason": "ok", "score": "7"}\n```', 0.7),
        ('Sure! {"score": 3, "reason": "it says {x}"} Hope that helps.', 0.3),
        ('{"reason": "cut off before", "score": 8', 0.8),
        ("Score: 7/10", 0.7),
        ("**Rating:** 6.5", 0.65),
        ("I give it [[4]]", 0.4),
        ("I would say 8/10.", 0.8),
        ("10", 1.0),
        ("0", 0.0),
    ],
)
def test_judge_quality(reply: str, quality: float) -> None:
    assert judge_quality(reply) == pytest.approx(quality)


@pytest.mark.parametrize(
    "reply",
    ["", "A fine answer.", '{"score": 11}', "Score: -1", '{"score": null}', '{"score": NaN}', '{"score": true}'],
)
def test_a_judge_without_a_score_is_refused(reply: str) -> None:
    with pytest.raises(GradeError):
        judge_quality(reply)


@given(st.text())
def test_judge_quality_never_breaks(reply: str) -> None:
    with contextlib.suppress(GradeError):
        assert 0 <= judge_quality(reply) <= 1


@given(st.integers(0, 10), st.text())
def test_judge_reads_the_json_it_asks_for(score: int, reason: str) -> None:
    assert judge_quality(json.dumps({"reason": reason, "score": score})) == score / 10


def test_judge_messages_hold_everything() -> None:
    system, user = judge_messages("What is 6 times 7?", "41", ["42", "forty-two"])
    assert "score" in system["content"]
    assert "reference answers" in system["content"]
    for text in ("What is 6 times 7?", "41", "42", "forty-two"):
        assert text in user["content"]
    assert "no reference answer" in judge_messages("q", "r")[0]["content"]
