"""What the generalist learns beside the skills: to read the answers of others and write the right one.

The prompt is that of the strategies `mixture_of_agents` and `self_moa`. Among the answers are right ones, near misses,
answers to another question of the kind, and on two-skill questions what the first step gives; wrong answers may agree
with each other, and all of them may be wrong, so that a majority is a hint and no proof.
"""

from random import Random

from routers.strategies.aggregation import aggregation_text
from training.pocket.composed import ask_two
from training.pocket.questions import Question, Split
from training.pocket.skills import SKILLS

_TWO_SKILLS = 0.15
_ALL_RIGHT, _ALL_WRONG = 0.2, 0.2
_AGREE_ON_WRONG = 0.5


def near_miss(rng: Random, answer: str) -> str:
    """The answer with one slip: a character changed, dropped, doubled, exchanged with the next, or parts exchanged."""
    parts = answer.split(", ")
    if len(parts) > 1 and rng.random() < 0.5:
        i, j = rng.sample(range(len(parts)), 2)
        parts[i], parts[j] = parts[j], parts[i]
        return ", ".join(parts)
    place = rng.randrange(len(answer))
    before, letter, after = answer[:place], answer[place], answer[place + 1 :]
    slips = (
        before + _like(rng, letter) + after,
        before + _like(rng, letter) + after,
        before + after,
        before + letter * 2 + after,
        before + after[:1] + letter + after[1:],
    )
    return rng.choice(slips) or answer * 2


def _like(rng: Random, letter: str) -> str:
    """A character of the same kind, mostly a neighbour."""
    code = ord(letter) + rng.choice((-2, -1, -1, 1, 1, 2))
    for first, last in (("0", "9"), ("a", "z"), ("A", "Z")):
        if first <= letter <= last:
            return chr(min(max(code, ord(first)), ord(last)))
    return letter


def _wrong(rng: Random, question: Question, other: str) -> str:
    """A wrong answer to the question; ``other`` is the right answer to another question of the kind."""
    pool = [other, *(step.answer for step in question.steps[:-1])]
    for _ in range(20):
        found = rng.choice(pool) if rng.random() < 0.4 else near_miss(rng, question.answer)
        if found != question.answer:
            return found
    return question.answer * 2


def _candidates(rng: Random, question: Question, other: str) -> list[str]:
    """Two to five answers in random order, some of them right."""
    count = rng.randint(2, 5)
    case = rng.random()
    if case < _ALL_RIGHT:
        return [question.answer] * count
    right = rng.randint(1, count - 1)
    if case > 1 - _ALL_WRONG and len(question.steps) == 1:
        right = 0
    wrong = [_wrong(rng, question, other) for _ in range(count - right)]
    if rng.random() < _AGREE_ON_WRONG:
        wrong = [wrong[0]] * len(wrong)
    answers = [question.answer] * right + wrong
    rng.shuffle(answers)
    return answers


def aggregation(rng: Random, split: Split = "train") -> tuple[Question, list[str]]:
    """A random question of this split and answers of others to it."""
    if rng.random() < _TWO_SKILLS:
        return (question := ask_two(rng, split)), _candidates(rng, question, near_miss(rng, question.answer))
    skill = rng.choice(list(SKILLS.values()))
    task = rng.choice(skill.tasks).name
    question, other = skill.ask(rng, split, (task,)), skill.ask(rng, split, (task,))
    return question, _candidates(rng, question, other.answer)


def aggregation_lesson(rng: Random) -> tuple[str, str]:
    """A random exercise: an aggregation prompt and its answer."""
    question, answers = aggregation(rng)
    return aggregation_text(question.query, answers), question.answer
