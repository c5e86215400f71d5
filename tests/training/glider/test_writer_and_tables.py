"""Instructions by an expert, the rule-based tasks, and the tables of the document."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.experts.upstream import run_upstream
from training.errors import TrainJobError
from training.glider import rules
from training.glider.compare import Asked, Rules, with_tables
from training.glider.spec import Writer
from training.glider.writer import write_instruction
from training.mixing.data import Example

EXAMPLES = [Example(query=f"{n} + 1", answer=str(n + 1)) for n in range(9)]


def fleet(folder: Path, url: str, model: str) -> Path:
    remote = {"base_url": url, "model": model, "max_retries": 0}
    path = folder / "fleet.yaml"
    path.write_text(
        yaml.safe_dump({"experts": [{"name": "big", "remote": remote}, {"name": "other", "remote": remote}]})
    )
    return path


async def test_a_writer_sees_five_examples_and_is_taken_at_its_word(tmp_path: Path) -> None:
    async with run_upstream() as upstream:
        writer = Writer(fleet=fleet(tmp_path, upstream.url, "good"), expert="big")
        assert await asyncio.to_thread(write_instruction, writer, EXAMPLES) == "hi"
        (body,) = upstream.bodies()
        asked = body["messages"][0]["content"]
        assert [n for n in range(9) if f"{n} + 1" in asked] == [0, 1, 2, 3, 4]
        unknown = Writer(fleet=writer.fleet, expert="none")
        with pytest.raises(TrainJobError, match="no expert 'none': there are big, other"):
            await asyncio.to_thread(write_instruction, unknown, EXAMPLES)


async def test_a_writer_that_cannot_answer_fails_the_run(tmp_path: Path) -> None:
    writer = Writer(fleet=fleet(tmp_path, "http://127.0.0.1:9/v1", "good"), expert="big")
    with pytest.raises(TrainJobError, match="'big' wrote no instruction"):
        await asyncio.to_thread(write_instruction, writer, EXAMPLES)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task's files as the public data has them."""
    folder = tmp_path / "instructions"
    folder.mkdir()
    examples = {str(i): {"input": f" word{i}", "output": f"{i}"} for i in range(200)}
    examples["long"] = {"input": "x" * 500, "output": "x"}
    for name, content in (
        ("sum.json.gz", {"examples": examples}),
        ("sum.instructions.json.gz", {"annotations": ["Say the number.", "Tell the number.", "Say the number. "]}),
    ):
        (folder / name).write_bytes(gzip.compress(json.dumps(content).encode()))
    monkeypatch.setenv("ROUTER_DATA_DIR", str(tmp_path))
    return folder


def test_no_input_is_in_both_splits(data: Path) -> None:
    task = rules.read_tasks(["sum"])["sum"]
    assert task.instructions == ("Say the number.", "Tell the number.")
    assert len(task.train) + len(task.held_out) == 200
    assert not {text for text, _ in task.train} & {text for text, _ in task.held_out}
    assert 20 <= len(task.held_out) <= 60
    query, answer = task.ask(Random(0), "held_out")
    instruction, text = query.split("\n")
    assert instruction in task.instructions
    assert (text, answer) in task.held_out
    assert task.sample(1, 5, "train") == task.sample(1, 5, "train") != task.sample(2, 5, "train")


def test_missing_data_says_where_it_is_looked_for(data: Path) -> None:
    with pytest.raises(TrainJobError, match=r"task 'diff' cannot be read: .*ROUTER_DATA_DIR"):
        rules.read_tasks(["diff"])


@pytest.mark.parametrize(
    ("task", "answer", "told", "right"),
    [
        ("taxonomy_animal", "cat, dog", "dog, cat", True),
        ("taxonomy_animal", "cat, dog", "dog", False),
        ("sum", "12", " 12.", True),
        ("first_word_letter", "a", "A", False),
    ],
)
def test_what_counts_as_right(task: str, answer: str, told: str, right: bool) -> None:
    assert Rules.right(Rules.__new__(Rules), Asked(task, "?", answer), told) is right


def test_the_documents_tables_are_made_of_the_results() -> None:
    figure = {"value": 0.5, "low": 0.41, "high": 0.6}
    less = {"value": 0.125, "low": -0.01, "high": 0.2}
    found: dict[str, Any] = {
        "held_in": ["a"],
        "held_out": ["b"],
        "held_in_accuracy": {"glider": figure, "arrow": figure},
        "held_out_accuracy": {"glider": figure, "arrow": figure},
        "glider_less_held_in": {"arrow": less},
        "glider_less_held_out": {"arrow": less},
        "tasks": {"glider": {"a": 0.5, "b": 0.25}},
    }
    page = (
        "<!-- rules -->\nold\n<!-- end -->\n<!-- rules-tasks -->\n<!-- end -->\n<!-- pocket -->\nkept\n<!-- end -->\n"
    )
    filled = with_tables(page, {"rules": found})
    assert "| arrow | 50.0% (41 to 60) | +12.5 (-1.0 to +20.0) |" in filled
    assert "| glider | 50 | 25 |" in filled
    assert "old" not in filled
    assert "kept" in filled
