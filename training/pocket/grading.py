"""Sampling and grading: what ``python -m training.pocket sample`` and ``grade`` do."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from random import Random
from typing import Literal

from training.pocket.composed import COMPOSITIONS, ask_two
from training.pocket.questions import PocketError, Question, Split, UnknownQuestionError, clean_answer, pattern
from training.pocket.skills import SKILLS

Kind = Literal["one", "two"]
_MOST_REPEATED = 10_000  # in a row


def sample(seed: int, count: int, kind: Kind = "one", split: Split = "held_out") -> Iterator[Question]:
    """Different questions of a split: uniform over the skills, or of two skills each. The same for the same seed.

    Raises `PocketError` once there seem to be no more.
    """
    rng = Random(f"sample:{kind}:{split}:{seed}")
    skills = list(SKILLS.values())
    seen: set[str] = set()
    repeated = 0
    while len(seen) < count:
        question = rng.choice(skills).ask(rng, split) if kind == "one" else ask_two(rng, split)
        if question.id in seen:
            repeated += 1
            if repeated == _MOST_REPEATED:
                raise PocketError(f"there are no {count} different questions of this kind: {len(seen)} were found")
            continue
        repeated = 0
        seen.add(question.id)
        yield question


def is_right(question_skills: Iterable[str], answer: str, response: str) -> bool:
    """Whether a response is exactly the answer, but for spaces, a last full stop and, where no skill minds, case."""
    case_matters = any(SKILLS[name].case_matters for name in question_skills)
    return clean_answer(response, case_matters) == clean_answer(answer, case_matters)


@cache
def _phrasings() -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
    """Every phrasing's pattern with its skills, the one with most literal text first, for the first match is meant."""
    one = [
        (phrasing, (skill.name,))
        for skill in SKILLS.values()
        for task in skill.tasks
        for phrasing in (*task.phrasings, *task.held_out_phrasings)
    ]
    two = [(phrasing, composition.skills) for composition in COMPOSITIONS for phrasing in composition.phrasings]
    by_literal_text = sorted([*two, *one], key=lambda entry: -len(re.sub(r"\{\w+\}", "", entry[0])))
    return [(pattern(phrasing), skills) for phrasing, skills in by_literal_text]


def skills_of(query: str) -> tuple[str, ...]:
    """The skills that a sampled query needs, from its wording.

    Raises:
        UnknownQuestionError: No task words a query like this.
    """
    text = " ".join(query.split())
    found = next((skills for known, skills in _phrasings() if known.fullmatch(text)), None)
    if found is None:
        raise UnknownQuestionError(f"no pocket task words a query like {query!r}: grade what `sample` printed")
    return found


def grade_each(lines: Iterable[Mapping[str, str]]) -> Iterator[bool]:
    """Whether each response is right."""
    for line in lines:
        yield is_right(skills_of(line["query"]), line["answer"], line["response"])


def grade(lines: Iterable[Mapping[str, str]]) -> dict[str, object]:
    """The share of right responses, overall and by skill; a two-skill question counts as ``first+second``."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for line in lines:
        skills = skills_of(line["query"])
        right["+".join(skills)].append(is_right(skills, line["answer"], line["response"]))
    verdicts = [verdict for group in right.values() for verdict in group]
    return {
        "overall": sum(verdicts) / len(verdicts) if verdicts else None,
        "skills": {name: sum(group) / len(group) for name, group in sorted(right.items())},
    }
