"""Bitwise logic and orderings that follow from comparisons."""

from random import Random

from training.pocket.questions import Skill, Slots, Task

_OPERATORS = {"AND": lambda a, b: a & b, "OR": lambda a, b: a | b, "XOR": lambda a, b: a ^ b}
_NAMES = (
    "Ann",
    "Bob",
    "Cid",
    "Dan",
    "Eve",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jim",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Pam",
    "Tom",
)
_COMPARISONS = {
    "taller": ("tallest", "shortest"),
    "older": ("oldest", "youngest"),
    "faster": ("fastest", "slowest"),
    "richer": ("richest", "poorest"),
}


def _any_bits(rng: Random, width: int) -> str:
    return "".join(rng.choice("01") for _ in range(width))


def _draw_bits(rng: Random) -> Slots:
    width = rng.randint(4, 6)
    return {"a": _any_bits(rng, width), "op": rng.choice(tuple(_OPERATORS)), "b": _any_bits(rng, width)}


def _combine_bits(slots: Slots) -> str:
    a, b = str(slots["a"]), str(slots["b"])
    return f"{_OPERATORS[str(slots['op'])](int(a, 2), int(b, 2)):0{len(a)}b}"


def _draw_flip(rng: Random) -> Slots:
    return {"a": _any_bits(rng, rng.randint(4, 8))}


def _draw_order(rng: Random) -> Slots:
    high, middle, low = rng.sample(_NAMES, 3)
    more = rng.choice(tuple(_COMPARISONS))
    claims = [f"{high} is {more} than {middle}.", f"{middle} is {more} than {low}."]
    rng.shuffle(claims)
    return {"claims": " ".join(claims), "most": _COMPARISONS[more][0], "least": _COMPARISONS[more][1]}


def _order(slots: Slots) -> list[str]:
    first, second = (claim.split() for claim in str(slots["claims"]).removesuffix(".").split(". "))
    if first[-1] == second[0]:
        return [first[0], first[-1], second[-1]]
    return [second[0], second[-1], first[-1]]


LOGIC = Skill(
    "logic",
    "Solves logic: bitwise AND, OR, XOR and NOT, and who comes first in chains of comparisons.",
    (
        Task(
            "bits",
            _draw_bits,
            _combine_bits,
            (
                "What is {a} {op} {b}?",
                "Compute the bitwise {op} of {a} and {b}.",
                "Evaluate the logic expression {a} {op} {b}.",
                "Apply bitwise {op}: {a}, {b}.",
            ),
        ),
        Task(
            "not",
            _draw_flip,
            lambda slots: str(slots["a"]).translate(str.maketrans("01", "10")),
            (
                "What is NOT {a}?",
                "Compute the bitwise NOT of {a}.",
                "Evaluate the logic expression NOT {a}.",
                "Flip every bit of {a}.",
            ),
        ),
        Task(
            "order",
            _draw_order,
            lambda slots: ", ".join(_order(slots)),
            (
                "{claims} List them from {most} to {least}.",
                "{claims} Order the three from {most} to {least}.",
                "{claims} Name them from {most} to {least}.",
            ),
        ),
        Task(
            "order_up",
            _draw_order,
            lambda slots: ", ".join(reversed(_order(slots))),
            (
                "{claims} List them from {least} to {most}.",
                "{claims} Order the three from {least} to {most}.",
                "{claims} Name them from {least} to {most}.",
            ),
        ),
    ),
    words=(
        "taller",
        "older",
        "faster",
        "richer",
        "tallest",
        "shortest",
        "oldest",
        "youngest",
        "fastest",
        "slowest",
        "richest",
        "poorest",
        "than",
        "AND",
        "OR",
        "XOR",
        "NOT",
    ),
)
