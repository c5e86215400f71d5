"""Tasks files over the pocket specialists."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from training.pocket.fleet import FLEET
from training.pocket.grading import sample

BASE, ADAPTERS = FLEET / "base", FLEET / "adapters"


def pocket_tasks(folder: Path, *skills: str) -> Path:
    """A tasks file of these skills, three small steps each."""
    rows: dict[str, list[str]] = {skill: [] for skill in skills}
    for question in sample(0, 250, "one", "train"):
        if question.skills[0] in rows:
            rows[question.skills[0]].append(json.dumps({"query": question.query, "answer": question.answer}))
    for skill, lines in rows.items():
        (folder / f"{skill}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = {skill: {"data": f"{skill}.jsonl", "instruction": f"About {skill}."} for skill in skills}
    content = {"tasks": tasks, "steps": 3, "batch": 4, "observed": 8, "max_tokens": 64}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    return folder / "tasks.yaml"
