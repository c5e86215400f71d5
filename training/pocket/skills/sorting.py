"""Putting numbers, letters and words in order."""

from random import Random

from training.pocket.questions import Skill, Slots, Task
from training.pocket.skills.words import COMMON, any_word


def _draw_numbers(rng: Random) -> Slots:
    return {"items": ", ".join(map(str, rng.sample(range(1, 100), rng.randint(3, 4))))}


def _draw_letters(rng: Random) -> Slots:
    return {"word": any_word(rng, 3, 6)}


def _draw_words(rng: Random) -> Slots:
    return {"items": ", ".join(rng.sample(COMMON, 3))}


def _sort_numbers(slots: Slots) -> str:
    return ", ".join(sorted(str(slots["items"]).split(", "), key=int))


def _sort_numbers_down(slots: Slots) -> str:
    return ", ".join(sorted(str(slots["items"]).split(", "), key=int, reverse=True))


SORTING = Skill(
    "sorting",
    "Sorts numbers by size, and letters and words alphabetically.",
    (
        Task(
            "ascending",
            _draw_numbers,
            _sort_numbers,
            (
                "Sort these numbers in ascending order: {items}.",
                "Sort from smallest to largest: {items}.",
                "Put the numbers {items} in ascending order.",
                "Order these numbers from smallest to largest: {items}.",
            ),
        ),
        Task(
            "descending",
            _draw_numbers,
            _sort_numbers_down,
            (
                "Sort these numbers in descending order: {items}.",
                "Sort from largest to smallest: {items}.",
                "Put the numbers {items} in descending order.",
                "Order these numbers from largest to smallest: {items}.",
            ),
        ),
        Task(
            "letters",
            _draw_letters,
            lambda slots: "".join(sorted(str(slots["word"]))),
            (
                "Sort the letters of '{word}' alphabetically.",
                "Put the letters of '{word}' in alphabetical order.",
                "Order the letters of '{word}' from a to z.",
                "Arrange the letters in '{word}' alphabetically.",
            ),
        ),
        Task(
            "words",
            _draw_words,
            lambda slots: ", ".join(sorted(str(slots["items"]).split(", "))),
            (
                "Sort these words alphabetically: {items}.",
                "Put the words {items} in alphabetical order.",
                "Arrange these words from a to z: {items}.",
                "List these words in alphabetical order: {items}.",
            ),
        ),
    ),
)
