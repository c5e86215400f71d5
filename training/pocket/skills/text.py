"""Editing a word letter by letter."""

from random import Random
from string import ascii_lowercase

from training.pocket.questions import Skill, Slots, Task
from training.pocket.skills.capitals import CAPITAL_OF
from training.pocket.skills.elements import SYMBOLS
from training.pocket.skills.words import any_word

_NAMES = sorted(name for name in {*CAPITAL_OF.values(), *SYMBOLS} if name.isalpha() and len(name) <= 8)


def _any_word(rng: Random, shortest: int, longest: int) -> str:
    if longest == 8 and rng.random() < 0.4:
        return rng.choice(_NAMES)
    word = any_word(rng, shortest, longest)
    return word.capitalize() if rng.random() < 0.25 else word


def _draw_word(rng: Random) -> Slots:
    return {"word": _any_word(rng, 3, 8)}


def _draw_short_word(rng: Random) -> Slots:
    return {"word": _any_word(rng, 2, 5)}


def _draw_word_and_letter(rng: Random) -> Slots:
    word = _any_word(rng, 3, 8)
    return {"word": word, "letter": rng.choice(word)}


def _draw_replacement(rng: Random) -> Slots:
    word = _any_word(rng, 3, 8)
    return {"word": word, "letter": rng.choice(word), "other": rng.choice(ascii_lowercase)}


TEXT = Skill(
    "text",
    "Edits text: reverses, capitalizes and repeats words, removes and replaces letters.",
    (
        Task(
            "reverse",
            _draw_word,
            lambda slots: str(slots["word"])[::-1],
            (
                "Reverse the word '{word}'.",
                "Spell '{word}' backwards.",
                "Write '{word}' backwards.",
                "What is '{word}' spelled backwards?",
                "Write the word '{word}' in reverse.",
            ),
        ),
        Task(
            "upper",
            _draw_word,
            lambda slots: str(slots["word"]).upper(),
            (
                "Write '{word}' in capital letters.",
                "Convert '{word}' to upper case.",
                "Capitalize every letter of '{word}'.",
                "Put the word '{word}' in upper case.",
                "Change '{word}' to capital letters.",
            ),
        ),
        Task(
            "remove",
            _draw_word_and_letter,
            lambda slots: str(slots["word"]).replace(str(slots["letter"]), ""),
            (
                "Remove the letter '{letter}' from '{word}'.",
                "Delete every '{letter}' from the word '{word}'.",
                "Write '{word}' without the letter '{letter}'.",
                "Take the letter '{letter}' out of '{word}'.",
            ),
        ),
        Task(
            "replace",
            _draw_replacement,
            lambda slots: str(slots["word"]).replace(str(slots["letter"]), str(slots["other"])),
            (
                "Replace the letter '{letter}' with '{other}' in '{word}'.",
                "Replace every '{letter}' by '{other}' in the word '{word}'.",
                "In '{word}', change the letter '{letter}' to '{other}'.",
            ),
        ),
        Task(
            "double",
            _draw_short_word,
            lambda slots: str(slots["word"]) * 2,
            (
                "Repeat the word '{word}' twice without a space.",
                "Write '{word}' two times in a row.",
                "Join '{word}' with itself.",
            ),
        ),
    ),
    case_matters=True,
)
