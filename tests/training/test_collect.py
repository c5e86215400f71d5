"""Collecting: resume, ceiling, retries. `FakeFleet`, in this process, stands for a fleet that costs money."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.cards import ExpertCard
from experts.expert import Usage
from training.collect import AskError, Collected, Messages, Plan, collect, cost_bound
from training.errors import CollectError
from training.journal import Journal, Reply
from training.prompts import Prompt, read_prompts, split_of

CHEAP = ExpertCard(name="cheap", input_price=0.1, output_price=0.4)
DEAR = ExpertCard(name="dear", input_price=2.0, output_price=8.0)
JUDGE = ExpertCard(name="judge", input_price=1.0, output_price=1.0)
PROMPTS = [Prompt(id=f"q{i}", query=f"{i}+{i}?", answer=str(2 * i)) for i in range(10)]


class FakeFleet:
    """Answers sums: `dear` always right, `cheap` right on even numbers; `judge` gives 8. Counts its calls."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.spent_usd = 0.0
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(self, card: ExpertCard, messages: Messages, max_tokens: int, temperature: float) -> Reply:
        question = messages[-1]["content"]
        self.calls[card.name, question] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return self.reply(card, self.text(card, question))

    def text(self, card: ExpertCard, question: str) -> str:
        if card is JUDGE:
            return '{"score": 8}'
        number = int(question.split("+")[0])
        return str(2 * number) if card is DEAR or number % 2 == 0 else "no idea"

    def reply(self, card: ExpertCard, text: str) -> Reply:
        usage = Usage(input_tokens=20, output_tokens=10)
        self.spent_usd += card.cost(usage)
        return Reply(
            text=text, input_tokens=20, output_tokens=10, latency_s=0.1, cost_usd=card.cost(usage), at=1_700_000_000.0
        )


class FlakyFleet(FakeFleet):
    """Raises the errors of a list, one a call, and then answers."""

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self.errors = errors

    async def __call__(self, card: ExpertCard, messages: Messages, max_tokens: int, temperature: float) -> Reply:
        if self.errors:
            raise self.errors.pop(0)
        return await super().__call__(card, messages, max_tokens, temperature)


def plan(**changes: object) -> Plan:
    values: dict[str, object] = {"prompts": PROMPTS, "cards": [CHEAP, DEAR], "concurrency": 4, "backoff_s": 0.0}
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


async def run(plan: Plan, fleet: FakeFleet, path: Path) -> Collected:
    with Journal(path) as journal:
        return await collect(plan, fleet, journal)


def tear(journal_path: Path) -> None:
    """Leave the file as a kill in the middle of a write does."""
    journal_path.write_bytes(journal_path.read_bytes() + b'{"call": 99, "ke')


async def test_every_pair_is_asked_once_and_graded(journal_path: Path) -> None:
    fleet = FakeFleet()
    collected = await run(plan(), fleet, journal_path)
    assert len(collected.graded) == collected.total == 20
    assert set(fleet.calls.values()) == {1}
    assert fleet.most_at_once == 4
    right = Counter(graded.expert for graded in collected.graded if graded.quality == 1)
    assert right == {"dear": 10, "cheap": 5}
    assert collected.spent_usd == pytest.approx(fleet.spent_usd)


async def test_a_second_run_pays_nothing_and_grades_the_same(journal_path: Path) -> None:
    first, again = FakeFleet(), FakeFleet()
    one = await run(plan(), first, journal_path)
    two = await run(plan(), again, journal_path)
    assert not again.calls
    assert sorted(map(repr, two.graded)) == sorted(map(repr, one.graded))
    other = await run(plan(grader="contains"), again, journal_path)
    assert not again.calls
    assert len(other.graded) == 20


async def test_a_run_that_was_cut_off_goes_on(journal_path: Path) -> None:
    first = FakeFleet()

    def stop_after_seven(collected: Collected) -> None:
        if collected.done == 7:
            raise CollectError("stop")

    with Journal(journal_path) as journal, pytest.raises(CollectError, match="stop"):
        await collect(plan(), first, journal, stop_after_seven)
    tear(journal_path)

    second = FakeFleet()
    collected = await run(plan(), second, journal_path)
    assert len(collected.graded) == 20
    assert (first.calls + second.calls).total() <= 20 + 4  # at most the calls under way were lost
    assert collected.spent_usd >= first.spent_usd + second.spent_usd - 1e-12


async def test_retries_what_may_be_retried(journal_path: Path) -> None:
    fleet = FlakyFleet([AskError("busy", retryable=True), AskError("busy", retryable=True, retry_after_s=0.01)])
    collected = await run(plan(concurrency=1), fleet, journal_path)
    assert len(collected.graded) == 20
    assert not collected.failed


async def test_what_fails_is_reported_and_asked_again_next_time(journal_path: Path) -> None:
    fleet = FlakyFleet([AskError("prompt too long")])
    collected = await run(plan(concurrency=1), fleet, journal_path)
    assert collected.failed == [("q0", "cheap", "prompt too long")]
    assert collected.done == collected.total
    again = FakeFleet()
    assert len((await run(plan(), again, journal_path)).graded) == 20
    assert again.calls == {("cheap", "0+0?"): 1}


async def test_a_service_that_is_gone_ends_the_run(journal_path: Path) -> None:
    with pytest.raises(CollectError, match="no service"):
        await run(plan(), FlakyFleet([CollectError("no service")]), journal_path)


async def test_a_judge_grades_and_its_cost_counts(journal_path: Path) -> None:
    fleet = FakeFleet()
    collected = await run(plan(grader="judge", judge=JUDGE), fleet, journal_path)
    assert {graded.quality for graded in collected.graded} == {0.8}
    assert fleet.calls.total() == 40
    assert collected.spent_usd == pytest.approx(fleet.spent_usd)
    assert sum(graded.reply.cost_usd for graded in collected.graded) < fleet.spent_usd
    again = FakeFleet()
    await run(plan(grader="judge", judge=JUDGE), again, journal_path)
    assert not again.calls


async def test_a_judge_that_says_nothing_is_asked_again(journal_path: Path) -> None:
    class Mute(FakeFleet):
        def text(self, card: ExpertCard, question: str) -> str:
            return "Hm." if card is JUDGE else super().text(card, question)

    one = plan(prompts=PROMPTS[:1], cards=[DEAR], grader="judge", judge=JUDGE, attempts=2)
    mute = Mute()
    collected = await run(one, mute, journal_path)
    assert "states no score" in collected.failed[0][2]
    assert mute.calls.total() == 3
    fleet = FakeFleet()
    assert (await run(one, fleet, journal_path)).graded[0].quality == 0.8
    assert fleet.calls.total() == 1


async def test_a_ceiling_leaves_out_what_does_not_fit(journal_path: Path) -> None:
    dear = cost_bound(DEAR, PROMPTS[0].chat, 1024)
    collected = await run(plan(max_cost_usd=dear * 0.99), FakeFleet(), journal_path)
    assert {expert for _, expert in collected.unaffordable} == {"dear"}
    assert {graded.expert for graded in collected.graded} == {"cheap"}
    assert len((await run(plan(), FakeFleet(), journal_path)).graded) == 20


class Gambler(FakeFleet):
    """Answers, fails and costs at random, up to the very bound."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw

    async def __call__(self, card: ExpertCard, messages: Messages, max_tokens: int, temperature: float) -> Reply:
        for _ in range(self.draw.randrange(4)):
            await asyncio.sleep(0)
        cost = cost_bound(card, messages, max_tokens) * self.draw.choice([0, 0.1, 1])
        fate = self.draw.choice(["answer", "answer", "free failure", "billed failure"])
        if fate == "free failure":
            raise AskError("refused", retryable=self.draw.random() < 0.5)
        self.spent_usd += cost
        if fate == "billed failure":
            raise AskError("timed out", retryable=True, billed=True)
        return Reply(text="1", input_tokens=1, output_tokens=1, latency_s=0.0, cost_usd=cost, at=0.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1.2), concurrency=st.integers(1, 12), kills=st.integers(0, 3))
def test_the_ceiling_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float, concurrency: int, kills: int
) -> None:
    everything = sum(cost_bound(card, prompt.chat, 64) for prompt in PROMPTS for card in (CHEAP, DEAR))
    path = tmp_path_factory.mktemp("ceiling") / "journal.jsonl"
    gambler = Gambler(random.Random(seed))
    one = plan(max_tokens=64, max_cost_usd=share * everything, concurrency=concurrency)

    def kill_at(count: int) -> Callable[[Collected], None]:
        def on_progress(collected: Collected) -> None:
            if collected.done >= count:
                raise CollectError("killed")

        return on_progress

    async def runs() -> Collected:
        for kill in range(kills):
            with Journal(path) as journal, pytest.raises(CollectError):
                await collect(one, gambler, journal, kill_at(3 * kill + 1))
        return await run(one, gambler, path)

    collected = asyncio.run(runs())
    assert collected.done == collected.total
    assert gambler.spent_usd <= one.max_cost_usd * (1 + 1e-9)
    assert gambler.spent_usd <= collected.spent_usd * (1 + 1e-9)


class Overbiller(FakeFleet):
    """Bills for a thousand times what was asked for, and answers with half a surrogate pair."""

    def reply(self, card: ExpertCard, text: str) -> Reply:
        return replace(super().reply(card, "\ud83d"), output_tokens=10_000_000, cost_usd=10.0)


async def test_an_expert_that_bills_beyond_its_bound_ends_a_run_with_a_ceiling(journal_path: Path) -> None:
    with pytest.raises(CollectError, match="'cheap' billed 10000000 output tokens"):
        await run(plan(cards=[CHEAP], max_cost_usd=1.0, concurrency=1), Overbiller(), journal_path)
    with Journal(journal_path) as journal:
        assert journal.spent_usd == 10.0
        assert [reply.text for reply in journal.replies.values()] == ["\ud83d"]  # what was paid for is kept


@pytest.mark.parametrize("ceiling", [float("nan"), float("inf"), -1.0])
def test_a_ceiling_that_bounds_nothing_is_refused(ceiling: float) -> None:
    with pytest.raises(CollectError, match="ceiling must be a finite number"):
        plan(max_cost_usd=ceiling)


async def test_another_temperature_is_another_call(journal_path: Path) -> None:
    fleet = FakeFleet()
    await run(plan(), fleet, journal_path)
    await run(plan(temperature=0.7), fleet, journal_path)
    assert set(fleet.calls.values()) == {2}


@given(st.text(min_size=1), st.sampled_from([CHEAP, DEAR]), st.integers(1, 4096))
def test_the_bound_covers_every_tokenizer_of_bytes(text: str, card: ExpertCard, max_tokens: int) -> None:
    worst = card.cost(Usage(input_tokens=len(text.encode(errors="surrogatepass")) + 64, output_tokens=max_tokens))
    assert cost_bound(card, [{"role": "user", "content": text}], max_tokens) >= worst


def test_two_runs_do_not_share_a_journal(journal_path: Path) -> None:
    with Journal(journal_path), pytest.raises(CollectError, match="another collection"), Journal(journal_path):
        pass


@pytest.mark.parametrize("line", ["[]", "nonsense", '{"call": 5, "cost_usd": 1}', '{"no": "call"}'])
def test_a_file_that_is_no_journal_is_refused(journal_path: Path, line: str) -> None:
    journal_path.write_text(line + "\n")
    with pytest.raises(CollectError, match=r"journal\.jsonl:1"), Journal(journal_path):
        pass
    assert journal_path.read_text() == line + "\n"


def test_a_plan_that_cannot_be_graded_is_refused_before_anything_is_spent() -> None:
    with pytest.raises(CollectError, match="no judge is named"):
        plan(grader="judge")
    with pytest.raises(CollectError, match="'q': grader 'exact' needs a right answer"):
        plan(prompts=[Prompt(id="q", query="?")])
    with pytest.raises(CollectError, match="not a letter"):
        plan(prompts=[Prompt(id="q", query="?", answer="maybe", grader="choice")])


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "a", "query": "2+2?", "answer": 4, "grader": "numeric"},
        {"id": "b", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        {"id": "c", "query": "Capital?", "answer": ["Rome", "Roma"], "split": "test", "task": "capitals"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    one, two, three = read_prompts(path)
    assert one.answers == ("4",)
    assert one.chat == [{"role": "user", "content": "2+2?"}]
    assert [turn["role"] for turn in two.chat] == ["system", "user"]
    assert three.answers == ("Rome", "Roma")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "query": "x"}', '{"id": "a", "query": "y"}'], r":2: id 'a' is there twice"),
        (['{"id": "a"}'], r":1: line: .*either query or messages"),
        (['{"id": "a", "query": "x", "messages": []}'], r":1: messages"),
        (['{"id": "a", "query": "x", "grader": "vibes"}'], r":1: grader"),
        (['{"id": "a", "query": "x", "expert": "gpt"}'], r":1: expert: Extra"),
        (['{"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'], r"messages\.0\.content"),
        (["{"], r":1: line: Invalid JSON"),
        ([], "holds no prompts"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CollectError, match=message):
        read_prompts(path)


def test_a_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="cannot read prompts"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_text_may_hold_any_line_separator_but_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "1", "query": "a\u2028b\u0085c"}\n{"id": "2", "query": "d"}\n', encoding="utf-8")
    assert [prompt.query for prompt in read_prompts(path)] == ["a\u2028b\u0085c", "d"]


def test_the_split_stays_and_is_about_its_share() -> None:
    splits = [split_of(f"q{i}", 0.3) for i in range(2000)]
    assert splits == [split_of(f"q{i}", 0.3) for i in range(2000)]
    assert 0.26 < splits.count("test") / 2000 < 0.34
    assert {split_of(f"q{i}", 0.0) for i in range(100)} == {"train"}
