"""Letter ciphers: Caesar shifts, ROT13, Atbash and letters as numbers."""

from random import Random
from string import ascii_lowercase

from training.pocket.questions import Skill, Slots, Task
from training.pocket.skills.words import any_word


def shift(word: str, places: int) -> str:
    """Each letter moved by so many places in the alphabet, around its end."""
    return "".join(ascii_lowercase[(ascii_lowercase.index(letter) + places) % 26] for letter in word)


def _draw_word(rng: Random) -> Slots:
    return {"word": any_word(rng, 3, 6)}


def _draw_shift(rng: Random) -> Slots:
    return {"word": any_word(rng, 3, 6), "n": rng.randint(1, 3)}


CIPHERS = Skill(
    "ciphers",
    "Encrypts words with letter ciphers: Caesar shifts, ROT13, Atbash and letters as numbers.",
    (
        Task(
            "caesar",
            _draw_shift,
            lambda slots: shift(str(slots["word"]), int(slots["n"])),
            (
                "Encrypt '{word}' with a Caesar shift of {n}.",
                "Shift every letter of '{word}' forward by {n}.",
                "Encode '{word}' with the Caesar cipher and key {n}.",
                "Apply a Caesar cipher with shift {n} to '{word}'.",
            ),
        ),
        Task(
            "rot13",
            _draw_word,
            lambda slots: shift(str(slots["word"]), 13),
            (
                "Encrypt '{word}' with ROT13.",
                "Apply the ROT13 cipher to '{word}'.",
                "Encode '{word}' in ROT13.",
            ),
        ),
        Task(
            "atbash",
            _draw_word,
            lambda slots: str(slots["word"]).translate(str.maketrans(ascii_lowercase, ascii_lowercase[::-1])),
            (
                "Encrypt '{word}' with the Atbash cipher.",
                "Apply the Atbash cipher to '{word}'.",
                "Encode '{word}' in Atbash.",
            ),
        ),
        Task(
            "numbers",
            _draw_word,
            lambda slots: " ".join(str(ascii_lowercase.index(letter) + 1) for letter in str(slots["word"])),
            (
                "Encode '{word}' with A=1, B=2 and so on.",
                "Encrypt '{word}' with the letter number cipher, A=1.",
                "Apply the A=1 number cipher to '{word}'.",
            ),
        ),
    ),
)
