"""What each strategy does with the same fresh pocket questions: share right, cost, latency, calls.

One- and two-skill questions are asked under every policy, and of experts alone, through HTTP. Answers are kept in a
file for each, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_service.bench.load import Answer, ask_all
from router_service.bench.routing import pocket

_MAX_TOKENS = 64
_AT_ONCE = 40
_RESAMPLES = 2000

Record = dict[str, Any]


def measure_strategies(
    url: str,
    models: Sequence[str],
    folder: Path,
    *,
    seed: int,
    one: int,
    two: int,
    connections: int,
    against: str,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every model (a policy or an expert) on `one` one-skill and `two` two-skill questions.

    Differences in accuracy are by the paired bootstrap over the questions, shares of cost are of the model `against`'s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {**question, "kind": kind}
        for kind, count in (("one", one), ("two", two))
        for question in (pocket("sample", "--seed", str(seed), "--n", str(count), "--kind", kind) if count else [])
    ]
    answers = {model: _answers(url, model, questions, folder, connections, say) for model in models}
    right = {model: _right(questions, found) for model, found in answers.items()}
    return {
        "questions": {"one": one, "two": two},
        "seed": seed,
        "against": against,
        "models": {
            model: {
                **_figures(questions, answers[model], right[model], answers[against]),
                "difference": {other: _difference(right[model], right[other]) for other in models if other != model},
            }
            for model in models
        },
    }


def _answers(
    url: str,
    model: str,
    questions: Sequence[Mapping[str, Any]],
    folder: Path,
    connections: int,
    say: Callable[[str], None],
) -> list[Record]:
    """One record for each question, from the file as far as it goes, then from the service."""
    path = folder / f"{model.replace(':', '-')}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for start in range(len(known), len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        bodies = [_body(model, str(question["query"])) for question in part]
        found = asyncio.run(ask_all(url, bodies, connections=connections))
        records = [_record(answer) for answer in found]
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        known += records
        say(f"{model}: {len(known)}/{len(questions)}")
    return known[: len(questions)]


def _body(model: str, query: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": query}]
    return {"model": model, "messages": messages, "max_tokens": _MAX_TOKENS, "temperature": 0}


def _record(answer: Answer) -> Record:
    return {
        "text": answer.text,
        "cost_usd": float(answer.headers["x-router-cost-usd"]),
        "calls": int(answer.headers["x-router-attempts"]),
        "expert": answer.headers["x-router-expert"],
        "latency_s": round(answer.total_s, 4),
    }


def _right(questions: Sequence[Mapping[str, Any]], answers: Sequence[Record]) -> list[bool]:
    lines = [
        {"query": question["query"], "answer": question["answer"], "response": answer["text"]}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [bool(line["right"]) for line in pocket("grade", "--each", lines=lines)]


def _figures(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Record],
    right: Sequence[bool],
    other: Sequence[Record],
) -> dict[str, Any]:
    verdicts = np.array(right, np.float64)
    kinds = np.array([question["kind"] for question in questions])
    cost = np.array([answer["cost_usd"] for answer in answers])
    latency = np.array([answer["latency_s"] for answer in answers])
    return {
        "right": _interval(verdicts),
        "right_one_skill": float(verdicts[kinds == "one"].mean()) if (kinds == "one").any() else None,
        "right_two_skills": float(verdicts[kinds == "two"].mean()) if (kinds == "two").any() else None,
        "cost_usd_per_1k": 1000 * float(cost.mean()),
        "share_of_cost": float(cost.sum() / sum(answer["cost_usd"] for answer in other)),
        "calls": float(np.mean([answer["calls"] for answer in answers])),
        "latency_s_p50": float(np.percentile(latency, 50)),
        "latency_s_p95": float(np.percentile(latency, 95)),
    }


def _difference(right: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    return _interval(np.array(right, np.float64) - np.array(other, np.float64))


def _interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
