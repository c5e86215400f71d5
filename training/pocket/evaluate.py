"""Measures every expert on held-out questions and checks the conditions under which there is room to route."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from training.pocket.answers import answers
from training.pocket.fleet import FLEET, Member, members
from training.pocket.grading import is_right, sample
from training.pocket.questions import Question, Step
from training.pocket.skills import SKILLS

REPORT_FILE = "evaluation.json"


@dataclass(frozen=True)
class Condition:
    """One condition on the fleet, its measured value and its bound."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True)
class Report:
    """Shares of right answers.

    Attributes:
        one: Expert -> skill -> share, over one-skill questions; ``overall`` is over all of them.
        two: Expert -> share, over two-skill questions.
        steps: Skill -> share of the specialist, over the sub-questions of two-skill questions.
        oracle: Share of one-skill questions that at least one expert gets right.
    """

    questions: Mapping[str, int]
    one: Mapping[str, Mapping[str, float]]
    two: Mapping[str, float]
    steps: Mapping[str, float]
    oracle: float

    def conditions(self) -> list[Condition]:
        own = [self.one[f"pocket-{name}"][name] for name in SKILLS]
        return [
            Condition("worst specialist on its own skill", min(own), 0.90),
            Condition("mean of the specialists on their own skills", fmean(own), 0.95),
            Condition("worst specialist on sub-questions", min(self.steps.values()), 0.90),
            Condition("mean of the specialists on sub-questions", fmean(self.steps.values()), 0.95),
            Condition("best single expert, one skill", max(row["overall"] for row in self.one.values()), 0.75, True),
            Condition("best expert per question, one skill", self.oracle, 0.95),
            Condition("best single expert, two skills", max(self.two.values()), 0.20, True),
        ]

    def to_json(self) -> dict[str, object]:
        """Everything measured, for ``evaluation.json``."""
        conditions = [
            {"name": c.name, "value": c.value, "at_most" if c.at_most else "at_least": c.bound, "met": c.met}
            for c in self.conditions()
        ]
        return {
            "questions": dict(self.questions),
            "one": {name: dict(row) for name, row in self.one.items()},
            "two": dict(self.two),
            "steps": dict(self.steps),
            "oracle": self.oracle,
            "conditions": conditions,
        }


def right_answers(member: Member, questions: Sequence[Question | Step], kept: Path | None = None) -> list[bool]:
    """Which questions the expert answers right."""
    responses = answers(member, [question.query for question in questions], kept)
    return [
        is_right(
            question.skills if isinstance(question, Question) else (question.skill,), question.answer, response.text
        )
        for question, response in zip(questions, responses, strict=True)
    ]


def evaluate(
    folder: Path = FLEET,
    seed: int = 0,
    one: int = 1100,
    two: int = 400,
    track: Callable[[Sequence[Member]], Iterable[Member]] = iter,
    kept: Path | None = None,
) -> Report:
    """Asks every expert held-out questions.

    Args:
        one: How many one-skill questions.
        two: How many two-skill questions; the specialists are asked their sub-questions too.
        track: Wraps the iteration over the experts, for a progress bar.
        kept: A folder of answers, from which an expert that has not changed answers again.
    """
    singles, doubles = list(sample(seed, one, "one")), list(sample(seed, two, "two"))
    steps = {name: [step for q in doubles for step in q.steps if step.skill == name] for name in SKILLS}
    one_right: dict[str, list[bool]] = {}
    two_right: dict[str, float] = {}
    steps_right: dict[str, float] = {}
    for member in track(members(folder)):
        own_steps = steps.get(member.part, [])
        verdicts = right_answers(member, [*singles, *doubles, *own_steps], kept)
        one_right[member.name] = verdicts[:one]
        two_right[member.name] = fmean(verdicts[one : one + two])
        if own_steps:
            steps_right[member.part] = fmean(verdicts[one + two :])
    return Report(
        questions={"one": one, "two": two, **{f"steps {name}": len(asked) for name, asked in steps.items()}},
        one={name: _by_skill(singles, verdicts) for name, verdicts in one_right.items()},
        two=two_right,
        steps=steps_right,
        oracle=fmean(map(any, zip(*one_right.values(), strict=True))),
    )


def _by_skill(questions: Sequence[Question], verdicts: Sequence[bool]) -> dict[str, float]:
    shares = {"overall": fmean(verdicts)}
    for name in SKILLS:
        shares[name] = fmean(v for q, v in zip(questions, verdicts, strict=True) if q.skills == (name,))
    return shares


def write_report(report: Report, folder: Path = FLEET) -> None:
    """Writes ``evaluation.json`` and the model card."""
    (folder / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n")
    (folder / "MODEL_CARD.md").write_text(model_card(report, folder))


def accuracy_table(report: Report) -> str:
    """The report as a Markdown table: a row for each expert, a column for each skill."""
    columns = ["overall", *SKILLS]
    lines = [f"| expert | {' | '.join(columns)} | two skills |", "|---" * (len(columns) + 2) + "|"]
    for name, row in report.one.items():
        cells = [f"{row[column]:.0%}" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {report.two[name]:.0%} |")
    steps = [f"{report.steps[name]:.0%}" if name in report.steps else "" for name in SKILLS]
    lines.append(f"| specialists on sub-questions |  | {' | '.join(steps)} |  |")
    return "\n".join(lines)


def _fleet_table(folder: Path) -> str:
    lines = ["| expert | active parameters | USD per M input tokens | output | what it does |", "|---|---|---|---|---|"]
    for m in members(folder):
        lines.append(
            f"| `{m.name}` | {m.active_parameters:,} | {m.input_price:.2f} | {m.output_price:.2f} | {m.description} |"
        )
    return "\n".join(lines)


def _conditions_table(report: Report) -> str:
    lines = ["| condition | measured | bound | met |", "|---|---|---|---|"]
    for c in report.conditions():
        bound = f"{'at most' if c.at_most else 'at least'} {c.bound:.0%}"
        lines.append(f"| {c.name} | {c.value:.1%} | {bound} | {'yes' if c.met else 'no'} |")
    return "\n".join(lines)


def model_card(report: Report, folder: Path) -> str:
    """The fleet's model card in Markdown."""
    template = (Path(__file__).parent / "model_card.md").read_text()
    fills = {
        "fleet": _fleet_table(folder),
        "accuracy": accuracy_table(report),
        "conditions": _conditions_table(report),
        "one": str(report.questions["one"]),
        "two": str(report.questions["two"]),
        "oracle": f"{report.oracle:.1%}",
        "skills": "\n".join(f"- **{skill.name}**: {skill.description}" for skill in SKILLS.values()),
    }
    for name, text in fills.items():
        template = template.replace(f"{{{{{name}}}}}", text)
    return template
