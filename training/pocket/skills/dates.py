"""Days of the year and the formats of dates."""

from datetime import date, timedelta
from random import Random

from training.pocket.questions import Skill, Slots, Task

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_COMMON_YEAR = 2023


def _any_day(rng: Random) -> date:
    return date(_COMMON_YEAR, 1, 1) + timedelta(days=rng.randrange(365))


def _draw_day_of_year(rng: Random) -> Slots:
    day = _any_day(rng)
    return {"n": rng.randint(2, 10), "date": f"{day.day} {MONTHS[day.month - 1]}"}


def _later(slots: Slots) -> str:
    number, month = str(slots["date"]).split()
    day = date(_COMMON_YEAR, MONTHS.index(month) + 1, int(number)) + timedelta(days=int(slots["n"]))
    return f"{day.day} {MONTHS[day.month - 1]}"


def _draw_date(rng: Random) -> Slots:
    day = _any_day(rng)
    return {"date": f"{day.day} {MONTHS[day.month - 1]} {rng.randint(1900, 2099)}"}


def _to_iso(slots: Slots) -> str:
    number, month, year = str(slots["date"]).split()
    return f"{year}-{MONTHS.index(month) + 1:02}-{int(number):02}"


def _to_slashes(slots: Slots) -> str:
    return "/".join(reversed(_to_iso(slots).split("-")))


def _draw_iso(rng: Random) -> Slots:
    return {"iso": _to_iso(_draw_date(rng))}


def _from_iso(slots: Slots) -> str:
    year, month, number = map(int, str(slots["iso"]).split("-"))
    return f"{number} {MONTHS[month - 1]} {year}"


DATES = Skill(
    "dates",
    "Counts calendar days, and reads and writes dates in ISO and other formats.",
    (
        Task(
            "later",
            _draw_day_of_year,
            _later,
            (
                "What date is {n} days after {date}?",
                "Which date comes {n} days after {date}?",
                "Today is {date}. What date is it in {n} days?",
                "What is the calendar date {n} days after {date}?",
            ),
        ),
        Task(
            "to_iso",
            _draw_date,
            _to_iso,
            (
                "Write the date {date} in ISO format.",
                "Convert the date {date} to ISO format.",
                "What is {date} as an ISO date?",
                "Format {date} as YYYY-MM-DD.",
            ),
        ),
        Task(
            "to_slashes",
            _draw_date,
            _to_slashes,
            (
                "Write the date {date} as DD/MM/YYYY.",
                "Convert the date {date} to DD/MM/YYYY.",
                "What is {date} as DD/MM/YYYY?",
                "Format {date} as DD/MM/YYYY.",
            ),
        ),
        Task(
            "from_iso",
            _draw_iso,
            _from_iso,
            (
                "Write the ISO date {iso} with the month's name.",
                "Which calendar day is the ISO date {iso}?",
                "Spell out the date {iso}.",
                "Write out the month of the date {iso} in words.",
            ),
        ),
    ),
    words=("If", "ago", "now", "today", "was", "week", "weekday"),
)
