"""Sums and differences of numbers below one hundred, products up to twelve times twelve."""

from random import Random

from training.pocket.questions import Skill, Slots, Task


def _any_number(rng: Random) -> int:
    return rng.randint(1, rng.choice((20, 99, 99)))


def _draw_sum(rng: Random) -> Slots:
    return {"a": _any_number(rng), "b": _any_number(rng)}


def _draw_difference(rng: Random) -> Slots:
    a, b = sorted((_any_number(rng), _any_number(rng)), reverse=True)
    return {"a": a, "b": b}


def _draw_product(rng: Random) -> Slots:
    return {"a": rng.randint(2, 12), "b": rng.randint(2, 12)}


ARITHMETIC = Skill(
    "arithmetic",
    "Adds, subtracts and multiplies small whole numbers.",
    (
        Task(
            "add",
            _draw_sum,
            lambda slots: str(int(slots["a"]) + int(slots["b"])),
            (
                "What is {a} + {b}?",
                "Calculate {a} + {b}.",
                "Add {a} and {b}.",
                "What is {a} plus {b}?",
                "Compute the sum of {a} and {b}.",
                "How much is {a} plus {b}?",
            ),
        ),
        Task(
            "subtract",
            _draw_difference,
            lambda slots: str(int(slots["a"]) - int(slots["b"])),
            (
                "What is {a} - {b}?",
                "Calculate {a} - {b}.",
                "Subtract {b} from {a}.",
                "What is {a} minus {b}?",
                "How much is {a} minus {b}?",
                "Compute the difference of {a} and {b}.",
            ),
        ),
        Task(
            "multiply",
            _draw_product,
            lambda slots: str(int(slots["a"]) * int(slots["b"])),
            (
                "What is {a} times {b}?",
                "Multiply {a} by {b}.",
                "Calculate {a} * {b}.",
                "Compute the product of {a} and {b}.",
                "How much is {a} times {b}?",
                "What is {a} multiplied by {b}?",
            ),
        ),
    ),
)
