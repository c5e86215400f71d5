"""Configuration files and examples: what is read, and what is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.errors import TrainJobError
from training.mixing.data import dataset, read_examples
from training.mixing.spec import read_spec

GOOD = {"base": "b", "gate": "mixlora", "data": "d.jsonl", "out": "o"}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_overrides_come_before_the_file(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, GOOD), gate="mola", out=None, seed=3)
    assert (spec.gate, spec.out, spec.seed) == ("mola", Path("o"), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must hold a mapping, not list"),
        ("a: [", "cannot read"),
        (GOOD | {"gates": 1}, "gates: Extra inputs"),
        ({"base": "b"}, "gate: Field required"),
        (GOOD | {"steps": 0}, "steps: .*greater than or equal to 1"),
        (GOOD | {"batch": 8, "micro_batch": 3}, "batch 8 must be a multiple of micro_batch 3"),
        (GOOD | {"adapters": {"a": "x"}, "rank": 4}, "leave them out where adapters are given"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainJobError, match=message):
        read_spec(written(tmp_path, content))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a"}', ":1: line: .*an answer is needed"),
        ('{"query": "a", "answer": "b", "adaptor": "c"}', ":1: adaptor: Extra inputs"),
        ("{", ":1: line"),
        ("", "holds no examples"),
    ],
)
def test_wrong_examples_say_where(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TrainJobError, match=message):
        read_examples(path)


def test_gates_trained_one_by_one_need_each_examples_adapter(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"query": "a", "answer": "b", "adapter": "y"}\n{"query": "a", "answer": "b"}\n')
    examples = read_examples(path)
    with pytest.raises(TrainJobError, match=r"example 2: adapter: .*name one of x, y, not None"):
        dataset(examples, ("x", "y"), alone=True)
    (row,) = dataset(examples[:1], ("x", "y"), alone=True)
    assert row["adapter"] == 1
    assert row["completion"] == [{"role": "assistant", "content": "b"}]
