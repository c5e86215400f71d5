"""Questions that need two skills in turn: the answer to the first step is part of the second."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from training.pocket.questions import PocketError, Question, Slots, Split, Step, Task, split_of
from training.pocket.skills import SKILLS

Link = Callable[[Random, str], Slots | None]
"""Makes the second step's slots from the first step's answer; None where that answer cannot be used."""

_MAX_DRAWS = 1000


@dataclass(frozen=True)
class Composition:
    """Two tasks in turn.

    Attributes:
        first: ``skill.task`` of the first step.
        second: The same of the second.
        phrasings: Format strings over the first step's slots and, with a leading underscore, the second's.
    """

    first: str
    second: str
    link: Link
    phrasings: tuple[str, ...]

    @property
    def skills(self) -> tuple[str, str]:
        return self.first.split(".")[0], self.second.split(".")[0]


def _number(largest: int) -> Link:
    """Links a number as ``n``."""
    return lambda rng, answer: {"n": int(answer)} if 1 <= int(answer) <= largest else None


def _summand(rng: Random, answer: str) -> Slots | None:
    return {"a": int(answer), "b": rng.randint(1, 99)} if 1 <= int(answer) <= 99 else None


def _minuend(rng: Random, answer: str) -> Slots | None:
    return {"a": int(answer), "b": rng.randint(1, int(answer))} if 2 <= int(answer) <= 99 else None


def _word(longest: int) -> Link:
    """Links a word as ``word``, with a small number ``n`` for ciphers that have a key."""

    def link(rng: Random, answer: str) -> Slots | None:
        return {"word": answer, "n": rng.randint(1, 3)} if answer.isalpha() and 3 <= len(answer) <= longest else None

    return link


def _atomic_number(rng: Random, answer: str) -> Slots | None:
    return {"x": answer} if 1 <= int(answer) <= 86 else None


def _day(rng: Random, answer: str) -> Slots | None:
    date = SKILLS["dates"].task("later").draw(rng)["date"]
    return {"n": int(answer), "date": date} if 2 <= int(answer) <= 10 else None


COMPOSITIONS: tuple[Composition, ...] = (
    Composition(
        "arithmetic.add",
        "roman.write",
        _number(999),
        ("Write the sum of {a} and {b} in Roman numerals.", "What is {a} + {b} as a Roman numeral?"),
    ),
    Composition(
        "arithmetic.multiply",
        "roman.write",
        _number(999),
        ("Give the product of {a} and {b} as a Roman numeral.", "What is {a} times {b} in Roman numerals?"),
    ),
    Composition(
        "arithmetic.add",
        "elements.named_by_number",
        _atomic_number,
        (
            "Which element has the atomic number {a} + {b}?",
            "Name the element whose atomic number is the sum of {a} and {b}.",
        ),
    ),
    Composition(
        "arithmetic.subtract",
        "dates.later",
        _day,
        ("What date is {a} - {b} days after {_date}?", "Which date comes {a} minus {b} days after {_date}?"),
    ),
    Composition(
        "roman.read",
        "arithmetic.add",
        _summand,
        ("Add {_b} to the Roman numeral {r} and answer in digits.", "What number is the Roman numeral {r} plus {_b}?"),
    ),
    Composition(
        "roman.read",
        "arithmetic.subtract",
        _minuend,
        ("Subtract {_b} from the Roman numeral {r} and answer in digits.", "What number is {r} minus {_b}?"),
    ),
    Composition(
        "elements.number",
        "arithmetic.add",
        _summand,
        ("Add {_b} to the atomic number of {x}.", "What is the atomic number of {x} plus {_b}?"),
    ),
    Composition(
        "elements.number",
        "roman.write",
        _number(999),
        ("Write the atomic number of {x} in Roman numerals.", "What is the atomic number of {x} as a Roman numeral?"),
    ),
    Composition(
        "elements.named_by_number",
        "text.reverse",
        _word(8),
        ("Spell the name of element number {x} backwards.", "Reverse the name of the element with {x} protons."),
    ),
    Composition(
        "elements.named_by_symbol",
        "ciphers.rot13",
        _word(6),
        (
            "Encrypt the name of the element with the symbol {x} with ROT13.",
            "Encode the name of the element {x} in ROT13.",
        ),
    ),
    Composition(
        "capitals.capital",
        "text.reverse",
        _word(8),
        ("Spell the capital of {x} backwards.", "Reverse the name of the capital of {x}."),
    ),
    Composition(
        "capitals.capital",
        "text.upper",
        _word(8),
        ("Write the capital of {x} in capital letters.", "Name the capital city of {x} in upper case."),
    ),
    Composition(
        "units.convert",
        "arithmetic.add",
        _summand,
        (
            "Convert {n} {source} to {target} and add {_b}.",
            "How many {target} are {n} {source} and {_b} {target} together?",
        ),
    ),
    Composition(
        "units.convert",
        "roman.write",
        _number(999),
        (
            "Convert {n} {source} to {target} in Roman numerals.",
            "Write in Roman numerals how many {target} are in {n} {source}.",
        ),
    ),
    Composition(
        "data.field",
        "arithmetic.add",
        lambda rng, answer: _summand(rng, answer) if answer.isdigit() else None,
        ("Add {_b} to the value of '{field}' in the JSON {json}.", "What is '{field}' plus {_b} in this JSON: {json}?"),
    ),
    Composition(
        "data.column",
        "text.reverse",
        _word(8),
        ("Reverse the {nth} value of the CSV row {row}.", "Spell the {nth} column of the CSV row {row} backwards."),
    ),
    Composition(
        "data.field",
        "ciphers.caesar",
        _word(6),
        ("Encrypt the value of '{field}' in the JSON {json} with a Caesar shift of {_n}.",),
    ),
    Composition(
        "sorting.letters",
        "text.upper",
        _word(8),
        ("Sort the letters of '{word}' and write them in capital letters.",),
    ),
    Composition(
        "sorting.letters",
        "ciphers.atbash",
        _word(6),
        ("Sort the letters of '{word}' alphabetically and encrypt them with the Atbash cipher.",),
    ),
    Composition(
        "text.reverse",
        "ciphers.caesar",
        _word(6),
        (
            "Reverse '{word}' and encrypt it with a Caesar shift of {_n}.",
            "Spell '{word}' backwards, then shift every letter forward by {_n}.",
        ),
    ),
    Composition(
        "text.remove",
        "sorting.letters",
        _word(6),
        ("Remove the letter '{letter}' from '{word}' and sort the other letters alphabetically.",),
    ),
)


def _task(path: str) -> Task:
    skill, task = path.split(".")
    return SKILLS[skill].task(task)


def _step(path: str, slots: Slots, rng: Random, split: Split) -> Step:
    """One step as a one-skill query: of this split where a phrasing of it is, else of the split's phrasings."""
    task = _task(path)
    query = task.word(slots, rng, split) or rng.choice(task.phrasings_for(split)).format(**slots)
    return Step(path.split(".")[0], query, task.solve(slots))


def ask_two(rng: Random, split: Split) -> Question:
    """Draws one two-skill question of this split."""
    for _ in range(_MAX_DRAWS):
        composition = rng.choice(COMPOSITIONS)
        first, second = _task(composition.first), _task(composition.second)
        slots = first.draw(rng)
        linked = composition.link(rng, first.solve(slots))
        if linked is None or (composition.skills[1] in {"ciphers", "sorting"} and not first.solve(slots).islower()):
            continue
        names = {**slots, **{f"_{name}": value for name, value in linked.items()}}
        query = rng.choice(composition.phrasings).format(**names)
        if split_of(query) == split:
            steps = (_step(composition.first, slots, rng, split), _step(composition.second, linked, rng, split))
            return Question(query, second.solve(linked), steps)
    raise PocketError(f"no {split!r} two-skill question in {_MAX_DRAWS} draws")
