"""Questions: the same for the same seed, exactly solved, and never both learned from and held out."""

from random import Random

import pytest

from training.pocket.composed import COMPOSITIONS, ask_two
from training.pocket.grading import Kind, sample
from training.pocket.questions import Split, normalise, split_of
from training.pocket.skills import SKILLS


@pytest.mark.parametrize("kind", ["one", "two"])
def test_sample_depends_on_the_seed_alone(kind: Kind) -> None:
    first, again, other = (list(sample(seed, 50, kind)) for seed in (1, 1, 2))
    assert first == again
    assert {q.id for q in first} != {q.id for q in other}


@pytest.mark.parametrize("kind", ["one", "two"])
def test_splits_share_no_question(kind: Kind) -> None:
    splits: tuple[Split, ...] = ("train", "observed", "held_out")
    queries = {split: {normalise(q.query) for q in sample(0, 400, kind, split)} for split in splits}
    assert not queries["train"] & queries["held_out"]
    assert not queries["train"] & queries["observed"]
    assert not queries["observed"] & queries["held_out"]
    assert all(split_of(query) == split for split, found in queries.items() for query in found)


def test_split_ignores_case_and_spacing() -> None:
    assert split_of("What is 4 + 5?") == split_of("  what IS 4  + 5? ")


@pytest.mark.parametrize("name", ["elements", "capitals"])
def test_facts_are_held_out_in_phrasings_that_training_lacks(name: str) -> None:
    for task in SKILLS[name].tasks:
        assert task.held_out_phrasings
        assert not set(task.phrasings) & set(task.held_out_phrasings)


def test_one_skill_sample_is_uniform_over_the_skills() -> None:
    counts = dict.fromkeys(SKILLS, 0)
    for question in sample(3, 1100):
        counts[question.skills[0]] += 1
    assert min(counts.values()) > 60
    assert max(counts.values()) < 150


@pytest.mark.parametrize(
    ("skill", "task", "slots", "answer"),
    [
        ("arithmetic", "add", {"a": 47, "b": 38}, "85"),
        ("arithmetic", "subtract", {"a": 62, "b": 17}, "45"),
        ("arithmetic", "multiply", {"a": 7, "b": 8}, "56"),
        ("units", "convert", {"n": 3, "source": "hours", "target": "minutes"}, "180"),
        ("roman", "write", {"n": 499}, "CDXCIX"),
        ("roman", "read", {"r": "XCIV"}, "94"),
        ("sorting", "ascending", {"items": "30, 4, 12"}, "4, 12, 30"),
        ("sorting", "descending", {"items": "30, 4, 12"}, "30, 12, 4"),
        ("sorting", "letters", {"word": "castle"}, "acelst"),
        ("sorting", "words", {"items": "tiger, maple, zebra"}, "maple, tiger, zebra"),
        ("text", "reverse", {"word": "Planet"}, "tenalP"),
        ("text", "upper", {"word": "river"}, "RIVER"),
        ("text", "remove", {"word": "banana", "letter": "a"}, "bnn"),
        ("text", "replace", {"word": "banana", "letter": "n", "other": "r"}, "barara"),
        ("text", "double", {"word": "tik"}, "tiktik"),
        ("dates", "to_slashes", {"date": "7 March 2024"}, "07/03/2024"),
        ("dates", "later", {"n": 10, "date": "25 February"}, "7 March"),
        ("dates", "to_iso", {"date": "7 March 2024"}, "2024-03-07"),
        ("dates", "from_iso", {"iso": "2024-03-07"}, "7 March 2024"),
        ("data", "to_json", {"pairs": "age=31, city=oslo"}, '{"age": 31, "city": "oslo"}'),
        ("data", "field", {"json": '{"age": 31, "city": "oslo"}', "field": "city"}, "oslo"),
        ("data", "to_csv", {"json": '{"age": 31, "city": "oslo"}'}, "31,oslo"),
        ("data", "column", {"row": "red,7,blue", "nth": "second"}, "7"),
        ("logic", "bits", {"a": "0110", "op": "XOR", "b": "0011"}, "0101"),
        ("logic", "bits", {"a": "0110", "op": "AND", "b": "0011"}, "0010"),
        ("logic", "not", {"a": "0110"}, "1001"),
        ("logic", "order", {"claims": "Bob is taller than Cid. Ann is taller than Bob."}, "Ann, Bob, Cid"),
        ("logic", "order_up", {"claims": "Ann is taller than Bob. Bob is taller than Cid."}, "Cid, Bob, Ann"),
        ("ciphers", "caesar", {"word": "xyz", "n": 3}, "abc"),
        ("ciphers", "rot13", {"word": "hello"}, "uryyb"),
        ("ciphers", "atbash", {"word": "abz"}, "zya"),
        ("ciphers", "numbers", {"word": "cab"}, "3 1 2"),
        ("elements", "symbol", {"x": "iron"}, "Fe"),
        ("elements", "number", {"x": "gold"}, "79"),
        ("elements", "named_by_symbol", {"x": "Hg"}, "mercury"),
        ("elements", "named_by_number", {"x": "8"}, "oxygen"),
        ("capitals", "capital", {"x": "France"}, "Paris"),
        ("capitals", "country", {"x": "New Delhi"}, "India"),
    ],
)
def test_answers_are_exact(skill: str, task: str, slots: dict[str, str | int], answer: str) -> None:
    assert SKILLS[skill].task(task).solve(slots) == answer


def test_every_task_is_drawn() -> None:
    rng = Random(0)
    for skill in SKILLS.values():
        for task in skill.tasks:
            slots = task.draw(rng)
            assert task.solve(slots)
            assert all(phrasing.format(**slots) for phrasing in (*task.phrasings, *task.held_out_phrasings))


def test_two_skill_questions_are_their_steps_in_turn() -> None:
    rng = Random(0)
    seen = set()
    for _ in range(600):
        question = ask_two(rng, "held_out")
        first, second = question.steps
        assert question.skills == (first.skill, second.skill)
        assert first.skill != second.skill
        assert question.answer == second.answer
        assert first.answer in second.query
        assert split_of(question.query) == "held_out"
        seen.add(question.skills)
    assert seen == {composition.skills for composition in COMPOSITIONS}
