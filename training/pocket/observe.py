"""The shipped observation table: what every expert really did on questions that no expert learned from.

One JSON line per query, gzipped: ``{"id", "task", "query", "split", "experts": {name: {"quality", "cost_usd",
"input_tokens", "output_tokens", "confidence"}}}``, beside ``experts.json`` with descriptions and prices in USD per
million tokens.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from training.pocket.answers import answers
from training.pocket.fleet import FLEET, Member, members
from training.pocket.grading import is_right, sample
from training.pocket.questions import Question

TABLE_FILE, EXPERTS_FILE = "observations.jsonl.gz", "experts.json"
_TEST_SHARE = 5


def _rows(member: Member, questions: Sequence[Question], kept: Path | None) -> list[dict[str, float]]:
    responses = answers(member, [question.query for question in questions], kept)
    return [
        {
            "quality": float(is_right(question.skills, question.answer, response.text)),
            "cost_usd": round(member.cost(response.input_tokens, response.output_tokens), 10),
            "input_tokens": response.input_tokens,
            "output_tokens": response.output_tokens,
            "confidence": response.confidence,
        }
        for question, response in zip(questions, responses, strict=True)
    ]


def _split(question: Question) -> str:
    return "test" if int(question.id, 16) % _TEST_SHARE == 0 else "train"


def observe(
    folder: Path = FLEET,
    seed: int = 0,
    one: int = 2000,
    two: int = 100,
    track: Callable[[Sequence[Member]], Iterable[Member]] = iter,
    kept: Path | None = None,
) -> None:
    """Asks every expert questions of the ``observed`` split and writes the table into the fleet's folder.

    ``kept`` is a folder of answers, from which an expert that has not changed answers again.
    """
    questions = [*sample(seed, one, "one", "observed"), *sample(seed, two, "two", "observed")]
    observed = {member.name: _rows(member, questions, kept) for member in track(members(folder))}
    lines = [
        json.dumps(
            {
                "id": question.id,
                "task": question.skills[0] if len(question.skills) == 1 else "two",
                "query": question.query,
                "split": _split(question),
                "experts": {name: rows[index] for name, rows in observed.items()},
            }
        )
        for index, question in enumerate(questions)
    ]
    text = "".join(f"{line}\n" for line in lines)
    (folder / TABLE_FILE).write_bytes(gzip.compress(text.encode(), mtime=0))
    cards = {
        m.name: {"description": m.description, "input_price": m.input_price, "output_price": m.output_price}
        for m in members(folder)
    }
    (folder / EXPERTS_FILE).write_text(json.dumps(cards, indent=2) + "\n")
