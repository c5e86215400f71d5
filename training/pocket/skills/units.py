"""Conversions between units of length, mass, volume and time, into whole numbers."""

from random import Random

from training.pocket.questions import Skill, Slots, Task

CONVERSIONS: dict[tuple[str, str], tuple[int, int]] = {
    ("kilometers", "meters"): (1000, 99),
    ("meters", "centimeters"): (100, 99),
    ("centimeters", "millimeters"): (10, 99),
    ("kilograms", "grams"): (1000, 99),
    ("liters", "milliliters"): (1000, 99),
    ("hours", "minutes"): (60, 48),
    ("minutes", "seconds"): (60, 60),
    ("days", "hours"): (24, 20),
    ("weeks", "days"): (7, 52),
    ("years", "months"): (12, 30),
    ("feet", "inches"): (12, 30),
    ("yards", "feet"): (3, 60),
    ("dollars", "cents"): (100, 99),
}
"""(from, to) -> (factor, the largest amount that is asked)."""


def _draw(rng: Random) -> Slots:
    (source, target), (_, largest) = rng.choice(list(CONVERSIONS.items()))
    return {"n": rng.randint(2, largest), "source": source, "target": target}


def _solve(slots: Slots) -> str:
    factor, _ = CONVERSIONS[str(slots["source"]), str(slots["target"])]
    return str(int(slots["n"]) * factor)


UNITS = Skill(
    "units",
    "Converts measurements between units of length, mass, volume, time and money.",
    (
        Task(
            "convert",
            _draw,
            _solve,
            (
                "Convert {n} {source} to {target}.",
                "How many {target} are in {n} {source}?",
                "Express {n} {source} in {target}.",
                "How many {target} make {n} {source}?",
                "Change {n} {source} into {target}.",
                "What is {n} {source} in {target}?",
            ),
        ),
    ),
    words=tuple(sorted({unit for pair in CONVERSIONS for unit in pair})),
)
