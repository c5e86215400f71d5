"""What the policy is asked in training and in its measurement: pocket questions, or tables of questions with answers.

A table is a gzipped JSON list of ``{"id", "Question", "answer": [..]}``, as PruneRAG's are; which of its questions are
for training is decided by their number alone.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.errors import TrainJobError
from training.graders import f1, same_words
from training.pocket.grading import Kind, is_right, sample
from training.pocket.questions import Split

Metric = Literal["exact", "f1"]
TRAIN_BELOW = 350
"""Questions of a table whose number is below this are for training, the others for tests."""


@dataclass(frozen=True)
class Asked:
    """A question and how its answer is graded, 0..1. `kind` groups questions in reports; pocket ones have `skills`."""

    id: str
    text: str
    kind: str
    grade: Callable[[str], float]
    skills: tuple[str, ...] = ()


def pocket_questions(seed: int, one: int, two: int, split: Split, without: Sequence[str] = ()) -> list[Asked]:
    """One-skill and two-skill pocket questions of a split, none of the skills in ``without``."""
    found: list[Asked] = []
    counts: tuple[tuple[Kind, int], ...] = (("one", one), ("two", two))
    for kind, count in counts:
        if not count:
            continue
        drawn = sample(seed, 4 * count if without else count, kind, split)
        kept = [question for question in drawn if not set(question.skills) & set(without)][:count]
        for question in kept:

            def grade(answer: str, skills: tuple[str, ...] = question.skills, right: str = question.answer) -> float:
                return float(is_right(skills, right, answer))

            found.append(Asked(question.id, question.query, kind, grade, question.skills))
    return found


def table_questions(path: Path, metric: Metric, *, train: bool) -> list[Asked]:
    """The questions of a table for training, or the others. Raises `TrainJobError` where it is no such table."""
    name = path.name.partition(".")[0]
    try:
        rows = json.loads(gzip.decompress(path.read_bytes()))
        asked = [_asked(name, row, metric) for row in rows if (int(row["id"]) < TRAIN_BELOW) == train]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise TrainJobError(f"{path} is no table of questions: {error!r}") from error
    if not asked:
        raise TrainJobError(f"{path} has no questions for {'training' if train else 'tests'}")
    return asked


def _asked(name: str, row: Mapping[str, Any], metric: Metric) -> Asked:
    grader = {"exact": same_words, "f1": f1}[metric]
    answers = [str(answer) for answer in row["answer"]]
    return Asked(
        f"{name}-{row['id']}", str(row["Question"]), name, lambda said: max(grader(said, one) for one in answers)
    )
