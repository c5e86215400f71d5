"""The pocket fleet's skills, one specialist each."""

from training.pocket.questions import Skill
from training.pocket.skills.arithmetic import ARITHMETIC
from training.pocket.skills.capitals import CAPITALS
from training.pocket.skills.ciphers import CIPHERS
from training.pocket.skills.data import DATA
from training.pocket.skills.dates import DATES
from training.pocket.skills.elements import ELEMENTS
from training.pocket.skills.logic import LOGIC
from training.pocket.skills.roman import ROMAN
from training.pocket.skills.sorting import SORTING
from training.pocket.skills.text import TEXT
from training.pocket.skills.units import UNITS

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (ARITHMETIC, UNITS, ROMAN, SORTING, TEXT, DATES, DATA, LOGIC, CIPHERS, ELEMENTS, CAPITALS)
}

__all__ = ["SKILLS"]
