"""Demonstrations of Router-R1's protocol on the pocket skills: a planner that knows the steps of every question.

A demonstration is made for a fleet of its own: names, descriptions and prices vary, specialists are missing or there
twice, and there are experts for things that nobody ever asked. So the policy learns to read cards instead of learning
the names of this fleet. Anybody who may know is asked, a general model as often as the specialist. `UNSEEN` is in none
of them: neither its questions nor its card.

What experts reply is the exact answer, often with a slip in it: it is to be copied, not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from experts.cards import ExpertCard
from routers.strategies.router_r1.protocol import MAX_CALLS, NO_REPLY, Message, information, opening
from training.pocket.aggregation import near_miss
from training.pocket.composed import COMPOSITIONS, Composition
from training.pocket.curriculum import repetition
from training.pocket.fleet import BASE, GENERALIST, Member
from training.pocket.questions import PocketError, Split, Task, split_of
from training.pocket.skills import SKILLS
from training.pocket.skills.words import COMMON, any_word, made_up

UNSEEN = "logic"
"""The specialist that the policy is never shown in training, to measure what it does with a card alone."""
LONGEST_REPLY = 200
NOT_KNOWN = "I do not know."

_GENERAL = "general"
_SPECIALISTS = tuple(name for name in SKILLS if name != UNSEEN)
_MAX_DRAWS = 1000

_DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        "Calculates sums, differences and products.",
        "Addition, subtraction and multiplication: plus, minus, times.",
        "A calculator for small numbers.",
    ),
    "units": (
        "Changes units: meters, kilograms, liters, hours, dollars.",
        "Knows how many grams are in a kilogram and feet in a yard.",
        "Unit conversion.",
    ),
    "roman": (
        "Roman numerals, both ways.",
        "Converts numbers to Roman numerals and back.",
        "Writes as the Romans did.",
    ),
    "sorting": (
        "Puts numbers, words and letters in order.",
        "Ascending, descending and alphabetical order.",
        "Sorts lists.",
    ),
    "text": (
        "Spells words backwards, changes case, removes letters.",
        "A text editor: reverse, upper case, delete, replace, repeat.",
        "Works on the letters of a word.",
    ),
    "dates": (
        "A calendar: days after a date, and ISO formats.",
        "Formats dates and counts days.",
        "Dates and months.",
    ),
    "data": (
        "JSON and CSV.",
        "Gets fields out of JSON objects and columns out of CSV rows.",
        "Makes and reads JSON and CSV tables.",
    ),
    "ciphers": (
        "Caesar, ROT13 and Atbash ciphers.",
        "Encodes and encrypts words.",
        "Shifts letters by a key; secret writing.",
    ),
    "elements": (
        "The periodic table: atomic numbers, symbols, protons.",
        "Chemistry: names and symbols of elements.",
        "Knows every element's number.",
    ),
    "capitals": (
        "Geography: which city is the capital of which country.",
        "Capitals of countries.",
        "Names the capital of a country.",
    ),
    _GENERAL: (
        "A general model that can do a little of everything.",
        "Answers all kinds of questions, not always right.",
        "A small assistant for anything.",
    ),
}
_INVENTED_DESCRIPTIONS = (
    "Knows {0} and {1}.",
    "Answers questions about {0}, {1} and {2}.",
    "Tells the {0} and the {1} of things.",
    "Expert in {0}.",
    "{0} and {1}.",
    "Finds {0} or {1}, and {2} too.",
    "Works with {0}: {1}, {2}.",
    "Reads and writes {0}.",
)
_INVENTED_QUESTIONS = (
    "What is the {0} of {1}?",
    "Which {0} does {1} have?",
    "Give the {0} for {1}.",
    "{1}: name its {0}.",
    "How many {0} has {1}?",
    "Find {0} in {1}.",
    "What is {1} {0} {2}?",
    "Apply {0} to {1} and {2}.",
)
_THOUGHT_WORDS = "One Two step steps first for Now That is the answer No reply I can do this myself do not know"


@dataclass(frozen=True)
class Listed:
    """A card of a demonstration's fleet and the skill of its expert: a skill's name, ``general`` or invented words."""

    card: ExpertCard
    skill: str


@dataclass(frozen=True)
class Planned:
    """One step: who should be asked by skill, what, and what the answer is."""

    skill: str
    query: str
    answer: str


def skill_words() -> list[str]:
    """The words of descriptions and thoughts, which the policy's tokenizer keeps whole."""
    members = [Member(part).description for part in (BASE, *_SPECIALISTS, GENERALIST)]
    texts = [*members, *(text for texts in _DESCRIPTIONS.values() for text in texts), _THOUGHT_WORDS]
    return [word for text in [*texts, "pocket base generalist", " ".join(_SPECIALISTS)] for word in text.split()]


class Fleet:
    """A random fleet, and who of it may be asked for a skill."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.invented = [_topics(rng) for _ in range(rng.choice((0, 1, 2, 3)))]
        parts = self._parts()
        real_names, real_prices = rng.random() < 0.6, rng.random() < 0.6
        listed = [self._listed(part, real_names, real_prices) for part in parts]
        listed += [self._invented(topics) for topics in self.invented]
        rng.shuffle(listed)
        self.listed = [*{one.card.name: one for one in listed}.values()]

    @property
    def cards(self) -> list[ExpertCard]:
        return [one.card for one in self.listed]

    def who(self, skill: str, but: Sequence[str] = ()) -> str:
        """Any expert that may know: those of the skill and, unless it is invented, the general ones; none of ``but``.

        Which of them is right more often and which is cheap enough is for reinforcement to find.
        """
        asked = [one for one in self.listed if one.card.name not in but] or self.listed
        able = [one for one in asked if one.skill == skill]
        if skill in SKILLS or not able:
            able += [one for one in asked if one.skill == _GENERAL]
        return self._rng.choice(able or asked).card.name

    def _parts(self) -> list[str]:
        rng = self._rng
        whole = rng.random() < 0.5
        parts = [part for part in _SPECIALISTS if whole or rng.random() < 0.6]
        if rng.random() < 0.2:
            parts.append(rng.choice(_SPECIALISTS))
        generals = [part for part in (BASE, GENERALIST) if rng.random() < 0.85] or [rng.choice((BASE, GENERALIST))]
        return [*parts, *generals]

    def _listed(self, part: str, real_name: bool, real_price: bool) -> Listed:
        rng, member = self._rng, Member(part)
        skill = part if part in SKILLS else _GENERAL
        texts = (member.description,) * 3 + _DESCRIPTIONS[skill]
        prices = {BASE: 0.76, GENERALIST: 3.16}
        price = prices.get(part, 0.84) if real_price else round(10 ** rng.uniform(-1, 1), rng.choice((1, 2)))
        name = member.name if real_name else _name(rng)
        return Listed(ExpertCard(name=name, description=rng.choice(texts), output_price=price), skill)

    def _invented(self, topics: tuple[str, ...]) -> Listed:
        rng = self._rng
        said = [f"{topic}s" if topic.islower() and rng.random() < 0.4 else topic for topic in topics]
        description = rng.choice(_INVENTED_DESCRIPTIONS).format(*said)
        shown = len(said) if "{2}" in description else sum(word in description for word in said)
        price = rng.choice((0.84, round(10 ** rng.uniform(-1, 1), 2)))
        card = ExpertCard(name=_name(rng), description=description, output_price=price)
        return Listed(card, " ".join(topics[: max(1, shown)]))


def _name(rng: Random) -> str:
    first = any_word(rng, 3, 7)
    return rng.choice((first, f"{first}-{rng.randint(1, 99)}", f"{first}-{any_word(rng, 3, 6)}", f"pocket-{first}"))


def _topics(rng: Random) -> tuple[str, ...]:
    def topic() -> str:
        word = rng.choice((rng.choice(COMMON), made_up(rng, rng.randint(3, 6))))
        return word[:4].upper() if rng.random() < 0.25 else word

    return topic(), topic(), topic()


def _payload(rng: Random) -> str:
    kinds = (any_word(rng), any_word(rng).capitalize(), str(rng.randint(1, 999)), f"{rng.getrandbits(4):04b}")
    return rng.choice(kinds)


def _invented_steps(rng: Random, fleet: Fleet) -> tuple[str, list[Planned]]:
    """A question about an invented expert's topic, or one about the topic of an expert that is not there."""
    known = [one.skill for one in fleet.listed if " " in one.skill or one.skill not in (*SKILLS, _GENERAL)]
    skill = rng.choice(known) if known and rng.random() < 0.9 else " ".join(_topics(rng))
    topic, subject = rng.choice(skill.split()), _payload(rng)
    if known and rng.random() < 0.25:
        other_skill = rng.choice(known)
        other, middle, end = rng.choice(other_skill.split()), _payload(rng), _payload(rng)
        steps = [
            Planned(skill, f"What is the {topic} of {subject}?", middle),
            Planned(other_skill, f"What is the {other} of {middle}?", end),
        ]
        return f"What is the {other} of the {topic} of {subject}?", steps
    query = rng.choice(_INVENTED_QUESTIONS).format(topic, subject, _payload(rng))
    return query, [Planned(skill, query, _payload(rng))]


def _one_step(rng: Random, split: Split) -> tuple[str, list[Planned]]:
    name = rng.choice(_SPECIALISTS)
    question = SKILLS[name].ask(rng, split)
    return question.query, [Planned(name, question.query, _slip(rng, question.answer))]


def _slip(rng: Random, answer: str) -> str:
    return near_miss(rng, answer) if rng.random() < 0.25 else answer


def _task(path: str) -> Task:
    skill, task = path.split(".")
    return SKILLS[skill].task(task)


def _two_steps(rng: Random, split: Split) -> tuple[str, list[Planned]]:
    """A two-skill question and its steps, each worded by its task's first phrasing."""
    for _ in range(_MAX_DRAWS):
        composition: Composition = rng.choice(COMPOSITIONS)
        first, second = _task(composition.first), _task(composition.second)
        slots = first.draw(rng)
        answer = first.solve(slots)
        linked = composition.link(rng, answer)
        if linked is None or (composition.skills[1] in {"ciphers", "sorting"} and not answer.islower()):
            continue
        names = {**slots, **{f"_{name}": value for name, value in linked.items()}}
        query = rng.choice(composition.phrasings).format(**names)
        if split_of(query) != split:
            continue
        said = _slip(rng, answer)
        slot = next(name for name, value in linked.items() if str(value) == answer)
        steps = [
            Planned(composition.skills[0], first.phrasings[0].format(**slots), said),
            Planned(composition.skills[1], second.phrasings[0].format(**{**linked, slot: said}), ""),
        ]
        if any(split_of(step.query) != split for step in steps):
            continue
        steps[1] = replace(steps[1], answer=_slip(rng, second.solve(linked)))
        return query, steps
    raise PocketError(f"no {split!r} two-skill question in {_MAX_DRAWS} draws")


def demonstration(rng: Random, fleet: Fleet, split: Split = "train") -> list[Message]:
    """A conversation for this fleet, from its cards to the policy's answer."""
    kind = rng.random()
    if kind < 0.03:
        query, answer = repetition(rng)
        said = f"<think>I can do this myself.</think><answer>{answer}</answer>"
        return [*opening(fleet.cards, query), {"role": "assistant", "content": said}]
    if kind < 0.18:
        query, steps = _invented_steps(rng, fleet)
    else:
        query, steps = _one_step(rng, split) if kind < 0.45 else _two_steps(rng, split)
    return [*opening(fleet.cards, query), *_turns(rng, fleet, steps)]


def _turns(rng: Random, fleet: Fleet, steps: Sequence[Planned]) -> list[Message]:
    messages: list[Message] = []
    calls, known = 0, NOT_KNOWN
    breaks = 0.35 if rng.random() < 0.12 else 0.0
    thought = "One step, for {}." if len(steps) == 1 else "Two steps, first for {}."
    for step in steps:
        failed: list[str] = []
        while calls < MAX_CALLS:
            expert = fleet.who(step.skill, failed)
            calls += 1
            said = f"<think>{thought.format(expert)}</think><search> {expert}:{step.query} </search>"
            broken = rng.random() < breaks
            reply = information(NO_REPLY if broken else step.answer, LONGEST_REPLY, last=calls == MAX_CALLS)
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
            if not broken:
                known = step.answer
                break
            failed.append(expert)
            thought = "No reply. Now for {}."
        thought = "Now for {}."
    thought = "That is the answer." if known != NOT_KNOWN else NOT_KNOWN
    return [*messages, {"role": "assistant", "content": f"<think>{thought}</think><answer>{known}</answer>"}]
