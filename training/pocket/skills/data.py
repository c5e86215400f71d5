"""JSON objects and CSV rows."""

import json
from random import Random

from training.pocket.questions import Skill, Slots, Task
from training.pocket.skills.words import any_word

FIELDS = ("id", "age", "size", "price", "color", "owner", "label", "city", "team", "score")
_NUMERIC = frozenset({"id", "age", "size", "price", "score"})
ORDINALS = ("first", "second", "third")


def _any_value(rng: Random, field: str) -> str:
    return str(rng.randint(1, 99)) if field in _NUMERIC else any_word(rng, 3, 5)


def _parse_value(value: str) -> str | int:
    return int(value) if value.isdigit() else value


def _draw_pairs(rng: Random) -> Slots:
    return {"pairs": ", ".join(f"{field}={_any_value(rng, field)}" for field in rng.sample(FIELDS, 2))}


def _to_json(slots: Slots) -> str:
    pairs = (pair.split("=") for pair in str(slots["pairs"]).split(", "))
    return json.dumps({field: _parse_value(value) for field, value in pairs})


def _draw_object(rng: Random) -> Slots:
    fields = rng.sample(FIELDS, rng.randint(2, 3))
    record = {field: _parse_value(_any_value(rng, field)) for field in fields}
    return {"json": json.dumps(record), "field": rng.choice(fields)}


def _draw_row(rng: Random) -> Slots:
    values = (any_word(rng, 3, 5) if rng.random() < 0.7 else str(rng.randint(1, 99)) for _ in range(3))
    return {"row": ",".join(values), "nth": rng.choice(ORDINALS)}


DATA = Skill(
    "data",
    "Reads and writes structured data: JSON objects and CSV rows.",
    (
        Task(
            "to_json",
            _draw_pairs,
            _to_json,
            (
                "Write as a JSON object: {pairs}.",
                "Convert to JSON: {pairs}.",
                "Make a JSON object with the fields {pairs}.",
                "Turn these fields into JSON: {pairs}.",
            ),
        ),
        Task(
            "field",
            _draw_object,
            lambda slots: str(json.loads(str(slots["json"]))[str(slots["field"])]),
            (
                "What is the value of '{field}' in the JSON {json}?",
                "Read the field '{field}' from the JSON object {json}.",
                "Get '{field}' from this JSON: {json}.",
                "In the JSON {json}, what is the value of '{field}'?",
            ),
        ),
        Task(
            "to_csv",
            _draw_object,
            lambda slots: ",".join(map(str, json.loads(str(slots["json"])).values())),
            (
                "Convert the JSON object {json} to a CSV row.",
                "Write the values of the JSON {json} as a CSV row.",
                "Turn this JSON into a CSV row: {json}.",
            ),
        ),
        Task(
            "column",
            _draw_row,
            lambda slots: str(slots["row"]).split(",")[ORDINALS.index(str(slots["nth"]))],
            (
                "What is the {nth} value of the CSV row {row}?",
                "Get the {nth} column of the CSV row {row}.",
                "Read the {nth} field from this CSV row: {row}.",
            ),
        ),
    ),
    words=ORDINALS,
    case_matters=True,
)
