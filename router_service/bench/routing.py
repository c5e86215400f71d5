"""How well `auto` routes fresh questions of the pocket fleet, against every expert asked alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import httpx

from router_service.bench.load import Answer, ask_all

_MAX_TOKENS = 96
_COST = "x-router-cost-usd"


def measure_routing(url: str, *, seed: int, n: int, kind: str, connections: int, alone: bool) -> dict[str, Any]:
    """Share right and cost in USD of `auto` on `n` held-out questions; with `alone`, of each expert by itself too."""
    questions = pocket("sample", "--seed", str(seed), "--n", str(n), "--kind", kind)
    auto = ask_pocket(url, "auto", questions, connections=connections)
    result: dict[str, Any] = {"questions": len(questions), "seed": seed, "kind": kind, "auto": auto}
    if not alone:
        return result
    models = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    experts = [model["id"] for model in models if model.get("kind") == "expert"]
    single = {expert: ask_pocket(url, expert, questions, connections=connections) for expert in experts}
    best = max(single, key=lambda expert: single[expert]["right"])
    dearest = max(single, key=lambda expert: single[expert]["cost_usd"])
    return result | {
        "experts": single,
        "best_single_expert": best,
        "best_single_expert_right": single[best]["right"],
        "dearest_expert": dearest,
        "cost_against_dearest": round(auto["cost_usd"] / single[dearest]["cost_usd"], 4),
    }


def ask_pocket(url: str, model: str, questions: Sequence[dict[str, Any]], *, connections: int) -> dict[str, Any]:
    """Share right, for each skill too, and cost in USD of a model on questions that `pocket` has sampled."""
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": question["query"]}],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
        }
        for question in questions
    ]
    answers: list[Answer] = asyncio.run(ask_all(url, bodies, connections=connections))
    lines = [
        {"query": question["query"], "answer": question["answer"], "response": answer.text}
        for question, answer in zip(questions, answers, strict=True)
    ]
    (grades,) = pocket("grade", lines=lines)
    cost = sum(float(answer.headers[_COST]) for answer in answers)
    return {"right": grades["overall"], "cost_usd": round(cost, 9), "skills": grades["skills"]}


def pocket(*arguments: str, lines: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """`python -m training.pocket`, JSON lines in and out."""
    command = [sys.executable, "-m", "training.pocket", *arguments]
    sent = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(command, input=sent, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
