"""Tables of facts asked in both directions."""

from collections.abc import Mapping
from random import Random

from training.pocket.questions import Slots, Task


def lookup(
    name: str, table: Mapping[str, str], phrasings: tuple[str, ...], held_out_phrasings: tuple[str, ...]
) -> Task:
    """A task that asks for the value of a table's random key, the slot ``{x}``."""
    keys = tuple(table)

    def draw(rng: Random) -> Slots:
        return {"x": rng.choice(keys)}

    return Task(name, draw, lambda slots: table[str(slots["x"])], phrasings, held_out_phrasings)
