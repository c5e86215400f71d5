"""Words that questions are about: common ones, and made-up ones so that there are enough of them."""

from random import Random

_COMMON = """
apple beach bread brick candle castle cherry circle cloud copper corner cotton desert dragon eagle engine falcon
feather fiddle finger flower forest garden ginger goblet guitar hammer harbor helmet hollow honey island ivory
jacket jungle kettle kitten ladder lemon lizard magnet maple marble meadow melon mirror monkey mountain needle oasis
ocean orange orchid oyster paddle panda parrot pebble pencil pepper piano pigeon pillow planet pocket potato prairie
puzzle rabbit raven ribbon river rocket saddle salmon shadow shovel silver spider sponge stable stone sugar summer
temple thunder tiger timber tomato tulip tunnel turtle valley velvet violet violin walnut walrus whale willow window
winter wizard yellow zebra zipper anchor basket beetle bottle branch bridge butter button camel canyon carpet cactus
"""
COMMON = tuple(_COMMON.split())

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def made_up(rng: Random, length: int) -> str:
    """A pronounceable word that nobody ever used, such as ``tovika``."""
    first = rng.random() < 0.7
    return "".join(rng.choice(_CONSONANTS if (place % 2 == 0) == first else _VOWELS) for place in range(length))


def any_word(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """A common or a made-up word with a length between these two."""
    if rng.random() < 0.5:
        return rng.choice([word for word in COMMON if shortest <= len(word) <= longest] or [made_up(rng, longest)])
    return made_up(rng, rng.randint(shortest, longest))
