"""Questions of the pocket fleet: tasks that draw and solve them, phrasings that word them, a hash that holds them out.

A *skill* is a few *tasks*. A task draws its slots (``{"a": 47, "b": 38}``), solves them exactly (``"85"``) and words
them by one of its phrasings (``"What is 47 + 38?"``). Whether a question belongs to training or is held out depends
on nothing but a hash of its normalised text, so that no question can be in both. Tasks about facts have phrasings of
their own outside training, because the facts themselves must be known from there.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "observed", "held_out"]
Slots = Mapping[str, str | int]

_SPLITS: tuple[Split, ...] = ("held_out", "train", "train", "train", "observed", "train", "train", "train")

_MAX_DRAWS = 1000


class PocketError(Exception):
    """Base of the errors of ``training.pocket``."""


class UnknownQuestionError(PocketError):
    """A query is none that the pocket fleet's tasks could have worded."""


@dataclass(frozen=True)
class Step:
    """One sub-question of a question, worded as a one-skill query."""

    skill: str
    query: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question with its exact answer; ``steps`` are the one-skill queries that lead to it, in order."""

    query: str
    answer: str
    steps: tuple[Step, ...]

    @property
    def skills(self) -> tuple[str, ...]:
        return tuple(step.skill for step in self.steps)

    @property
    def id(self) -> str:
        """The first 12 hexadecimal digits of the normalised query's SHA-256."""
        return _digest(self.query)[:12]


def normalise(query: str) -> str:
    """Lower case and single spaces: two queries that differ in nothing else are the same query."""
    return " ".join(query.lower().split())


def _digest(query: str) -> str:
    return hashlib.sha256(normalise(query).encode()).hexdigest()


def split_of(query: str) -> Split:
    """The split that a query belongs to, by a hash of its normalised text.

    Experts learn from ``train``, what they did on ``observed`` is in the observation table that routers learn from, and
    neither has seen ``held_out``.
    """
    return _SPLITS[int(_digest(query)[12:20], 16) % len(_SPLITS)]


@dataclass(frozen=True)
class Task:
    """One kind of question within a skill.

    Attributes:
        draw: Random slots.
        solve: The exact answer to slots.
        phrasings: Format strings over the slots.
        held_out_phrasings: What questions outside training are worded by instead, for tasks about facts.
    """

    name: str
    draw: Callable[[Random], Slots]
    solve: Callable[[Slots], str]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...] = ()

    def phrasings_for(self, split: Split) -> tuple[str, ...]:
        return self.held_out_phrasings if split != "train" and self.held_out_phrasings else self.phrasings

    def word(self, slots: Slots, rng: Random, split: Split) -> str | None:
        """Words the slots so that the query belongs to the split; None where no phrasing does that."""
        phrasings = self.phrasings_for(split)
        queries = (phrasing.format(**slots) for phrasing in rng.sample(phrasings, len(phrasings)))
        return next((query for query in queries if split_of(query) == split), None)


@dataclass(frozen=True)
class Skill:
    """A named group of tasks that one specialist learns.

    Attributes:
        description: One sentence for the specialist's card.
        words: Words beside those of the phrasings that the tokenizer keeps whole.
        case_matters: Whether an answer in the wrong case is wrong.
    """

    name: str
    description: str
    tasks: tuple[Task, ...]
    words: tuple[str, ...] = ()
    case_matters: bool = False

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def ask(self, rng: Random, split: Split, among: Sequence[str] = ()) -> Question:
        """Draws one question of this split, of a random task or of one among those named."""
        tasks = [self.task(name) for name in among] or self.tasks
        for _ in range(_MAX_DRAWS):
            task = rng.choice(tasks)
            slots = task.draw(rng)
            query = task.word(slots, rng, split)
            if query is not None:
                answer = task.solve(slots)
                return Question(query, answer, (Step(self.name, query, answer),))
        raise PocketError(f"skill {self.name!r} found no {split!r} question in {_MAX_DRAWS} draws")


def pattern(phrasing: str) -> re.Pattern[str]:
    """A regular expression that matches what the phrasing can word."""
    parts = re.split(r"\{\w+\}", phrasing)
    return re.compile("(.+)".join(re.escape(part) for part in parts), re.IGNORECASE)


def clean_answer(text: str, case_matters: bool) -> str:
    """An answer without what never makes it wrong: outer and doubled spaces, a last full stop and, mostly, case."""
    cleaned = " ".join(text.split()).removesuffix(".")
    return cleaned if case_matters else cleaned.lower()
