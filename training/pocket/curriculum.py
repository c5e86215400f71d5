"""What the base learns beside the skills: copying, spelling, counting, looking up, following instructions."""

import string
from collections.abc import Callable
from random import Random

from training.pocket.skills.words import any_word

Lesson = Callable[[Random], tuple[str, str]]


def _any_string(rng: Random) -> str:
    alphabet = rng.choice((string.ascii_lowercase, string.ascii_letters, string.digits, "01", "IVXLCDM"))
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9)))


def _any_piece(rng: Random) -> str:
    return rng.choice((any_word(rng), any_word(rng).capitalize(), _any_string(rng)))


def repetition(rng: Random) -> tuple[str, str]:
    """A request to say something again, and what is to be said."""
    piece = " ".join(_any_piece(rng) for _ in range(rng.randint(1, 3)))
    return rng.choice(("Repeat after me: {}", "Copy this text: {}", "Say '{}'.", "Write '{}' again.")).format(
        piece
    ), piece


def _spell(rng: Random) -> tuple[str, str]:
    piece = _any_piece(rng)
    return rng.choice(("Spell '{}'.", "Write the letters of '{}' with spaces.")).format(piece), " ".join(piece)


def _join(rng: Random) -> tuple[str, str]:
    piece = _any_string(rng)
    return f"Join these letters: {' '.join(piece)}", piece


def _count(rng: Random) -> tuple[str, str]:
    piece = _any_piece(rng)
    return rng.choice(("How long is '{}'?", "Count the letters of '{}'.")).format(piece), str(len(piece))


def _place(rng: Random) -> tuple[str, str]:
    piece = _any_piece(rng)
    place = rng.randint(1, len(piece))
    return f"What is letter number {place} of '{piece}'?", piece[place - 1]


def _ends(rng: Random) -> tuple[str, str]:
    piece = _any_piece(rng)
    return rng.choice(
        ((f"What is the first letter of '{piece}'?", piece[0]), (f"What is the last letter of '{piece}'?", piece[-1]))
    )


def _look_up(rng: Random) -> tuple[str, str]:
    table = {any_word(rng, 3, 5): _any_string(rng)[:4] for _ in range(rng.randint(2, 4))}
    key = rng.choice(tuple(table))
    return f"Given {', '.join(f'{name} is {value}' for name, value in table.items())}: what is {key}?", table[key]


def _succeed(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        number = rng.randint(0, 998)
        return rng.choice(
            ((f"What comes after {number}?", str(number + 1)), (f"What comes before {number + 1}?", str(number)))
        )
    place, step = rng.randint(0, 22), rng.randint(1, 3)
    letters = string.ascii_lowercase
    return f"Which letter comes {step} after '{letters[place]}'?", letters[place + step]


def _continue(rng: Random) -> tuple[str, str]:
    unit = [_any_string(rng)[:3] for _ in range(rng.randint(2, 3))]
    return f"Continue: {' '.join(unit * 2)}", " ".join(unit)


def _compare(rng: Random) -> tuple[str, str]:
    a, b = rng.sample(range(1, 100), 2)
    return rng.choice(
        ((f"Which is larger, {a} or {b}?", str(max(a, b))), (f"Which is smaller, {a} or {b}?", str(min(a, b))))
    )


def _either(rng: Random) -> tuple[str, str]:
    a, b = any_word(rng), any_word(rng)
    return f"Which comes first in the alphabet, '{a}' or '{b}'?", min(a, b)


LESSONS: tuple[Lesson, ...] = (
    repetition,
    repetition,
    _spell,
    _join,
    _count,
    _place,
    _ends,
    _look_up,
    _succeed,
    _continue,
    _compare,
    _either,
)


def lesson(rng: Random) -> tuple[str, str]:
    """A random exercise: a query and its answer."""
    return rng.choice(LESSONS)(rng)


_WORDS = """
after me this text again the letters of with spaces these long is letter number first last what comes before larger
or smaller in alphabet Repeat Copy Say Write Spell Join How Count What Given Which Continue
"""
LESSON_WORDS = tuple(_WORDS.split())
"""The English words of the exercises, which the tokenizer keeps whole."""
