"""From the service's ledger and feedback to rows of a table."""

from __future__ import annotations

from typing import Any

from training.export import Export


def entry(name: str, **changes: Any) -> dict[str, Any]:
    """An entry of the ledger, as the service writes it."""
    return {
        "id": name,
        "key": "me",
        "at": 1e9,
        "status": 200,
        "text": f"question {name}",
        "calls": [call("a")],
        **changes,
    }


def call(expert: str, error: str | None = None) -> dict[str, Any]:
    usage = {"input_tokens": 11, "output_tokens": 7, "cached_input_tokens": 0}
    return {"expert": expert, **usage, "cost_usd": 0.002, "latency_s": 0.5, "error": error}


def test_a_rated_answer_becomes_a_row() -> None:
    exported = Export([entry("x")], {("x", "me"): 0.75}, {"a"}, test_share=0.0)
    (row,) = exported.rows
    assert (row.id, row.query, row.split) == ("x", "question x", "train")
    (observed,) = row.experts
    assert (observed.expert, observed.quality, observed.cost_usd) == ("a", 0.75, 0.002)
    assert (observed.input_tokens, observed.output_tokens) == (11, 7)
    assert (observed.latency_s, observed.observed_at) == (0.5, 1e9)
    assert not exported.left_out


def test_a_question_asked_again_stays_in_its_split() -> None:
    entries = [entry(f"x{i}", text="what is the time?") for i in range(30)]
    exported = Export(entries, {(f"x{i}", "me"): 1.0 for i in range(30)}, {"a"}, test_share=0.5)
    assert len({row.split for row in exported.rows}) == 1


def test_the_expert_that_answered_after_another_failed_gets_the_rating() -> None:
    exported = Export(
        [entry("x", calls=[call("a", "down"), call("b")])], {("x", "me"): 1.0}, {"a", "b"}, test_share=1.0
    )
    assert [(row.experts[0].expert, row.split) for row in exported.rows] == [("b", "test")]


def test_a_call_beside_the_answers_is_no_answer() -> None:
    calls = [call("a"), {**call("writer"), "beside": True}]
    (row,) = Export([entry("x", calls=calls)], {("x", "me"): 1.0}, {"a", "writer"}, test_share=0.0).rows
    assert [observed.expert for observed in row.experts] == ["a"]


def test_what_says_nothing_of_one_experts_quality_is_left_out_and_counted() -> None:
    entries = [
        entry("failed", status=503),
        entry("unrated"),
        entry("foreign"),
        entry("secret", text=None),
        entry("mixture", calls=[call("a"), call("b")]),
        entry("cached", calls=[]),
        entry("gone", calls=[call("z")]),
    ]
    ratings = {
        (one["id"], "other" if one["id"] == "foreign" else "me"): 1.0 for one in entries if one["id"] != "unrated"
    }
    exported = Export(entries, ratings, {"a", "b"}, test_share=0.3)
    assert not exported.rows
    assert exported.left_out == {
        "failed": 1,
        "not rated": 2,
        "text not kept": 1,
        "not one expert's answer": 2,
        "expert no longer there": 1,
    }
