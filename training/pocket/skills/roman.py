"""Roman numerals below one thousand, both ways."""

from random import Random

from training.pocket.questions import Skill, Slots, Task

LARGEST = 999
_SIGNS = (
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)


def to_roman(number: int) -> str:
    """The numeral of a number from 1 to 999."""
    numeral = ""
    for value, sign in _SIGNS:
        count, number = divmod(number, value)
        numeral += sign * count
    return numeral


_NUMBERS = {to_roman(number): number for number in range(1, LARGEST + 1)}


def _draw_number(rng: Random) -> Slots:
    return {"n": rng.randint(1, rng.choice((99, LARGEST)))}


def _draw_numeral(rng: Random) -> Slots:
    return {"r": to_roman(int(_draw_number(rng)["n"]))}


ROMAN = Skill(
    "roman",
    "Writes numbers as Roman numerals and reads Roman numerals as numbers.",
    (
        Task(
            "write",
            _draw_number,
            lambda slots: to_roman(int(slots["n"])),
            (
                "Write {n} in Roman numerals.",
                "What is {n} as a Roman numeral?",
                "Convert {n} to a Roman numeral.",
                "How do the Romans write {n}?",
                "Give the Roman numeral for {n}.",
                "Express {n} as a Roman numeral.",
            ),
        ),
        Task(
            "read",
            _draw_numeral,
            lambda slots: str(_NUMBERS[str(slots["r"])]),
            (
                "What number is the Roman numeral {r}?",
                "Convert the Roman numeral {r} to a number.",
                "Read the Roman numeral {r}.",
                "Which number does the Roman numeral {r} stand for?",
                "Write the Roman numeral {r} in digits.",
                "What is the value of the Roman numeral {r}?",
            ),
        ),
    ),
)
