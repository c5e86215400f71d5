"""Grading through the command line, as its users do it."""

import json
from io import StringIO

import pytest

from training.pocket.__main__ import main
from training.pocket.grading import Kind, is_right, sample, skills_of
from training.pocket.questions import UnknownQuestionError


@pytest.mark.parametrize("kind", ["one", "two"])
def test_sampled_lines_can_be_graded(
    kind: Kind, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sample", "--seed", "4", "--n", "40", "--kind", kind]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(line) == {"id", "skills", "query", "answer"} for line in lines)
    for index, line in enumerate(lines):
        line["response"] = line["answer"] if index % 4 else "no idea"
    monkeypatch.setattr("sys.stdin", StringIO("\n".join(map(json.dumps, lines))))
    assert main(["grade"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overall"] == 0.75
    assert set(report["skills"]) == {"+".join(line["skills"]) for line in lines}


@pytest.mark.parametrize("kind", ["one", "two"])
def test_skills_are_known_from_the_wording(kind: Kind) -> None:
    for question in sample(5, 1000, kind):
        assert skills_of(question.query) == question.skills, question.query


def test_unknown_query_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownQuestionError, match="Who wrote Hamlet"):
        skills_of("Who wrote Hamlet?")
    monkeypatch.setattr("sys.stdin", StringIO('{"query": "Who wrote Hamlet?", "answer": "a", "response": "b"}'))
    assert main(["grade"]) == 1
    assert "Who wrote Hamlet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 must be an object"),
        ('\n{"query": "What is 4 + 5?", "answer": "9"}', "line 2 must be an object"),
    ],
)
def test_bad_line_is_named(
    text: str, complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(text))
    assert main(["grade"]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("skill", "answer", "response", "right"),
    [
        ("arithmetic", "85", " 85. ", True),
        ("arithmetic", "85", "85 or 86", False),
        ("arithmetic", "85", "", False),
        ("capitals", "Paris", "paris", True),
        ("text", "RIVER", "river", False),
        ("sorting", "4, 12", "4,  12", True),
        ("sorting", "4, 12", "12, 4", False),
    ],
)
def test_is_right(skill: str, answer: str, response: str, right: bool) -> None:
    assert is_right((skill,), answer, response) is right
