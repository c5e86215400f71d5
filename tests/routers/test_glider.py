"""GLIDER's global half: scores and bias by instruction and by query, narrowing, and what can reach it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.cards import ExpertCard
from experts.expert import ExpertRequest, Part
from routers.contracts import FloatArray, Observations, Query
from routers.embedder import Embedder
from routers.errors import RouterConfigError
from routers.glider import GliderRouter
from routers.guide import Guide, clean_instruction, prompt_for_examples, prompt_for_query
from routers.registry import create_router, load_router
from tests.routers.scripted import DEAD, FakeFleet, says

WORDS = {
    "dates": "which day of the week month year",
    "sums": "add these two numbers together total",
    "cities": "name the capital city of that country",
}
INSTRUCTIONS = {"dates": "work with calendar dates", "sums": "calculate a sum", "cities": "tell where a place lies"}


def observed(names: list[str], *, tasks: bool = True, each: int = 12) -> Observations:
    """Every expert on its own examples alone."""
    rows = [(e, f"{WORDS[name]} item{i}") for e, name in enumerate(names) for i in range(each)]
    shape = (len(rows), len(names))
    quality = np.full(shape, np.nan, np.float32)
    for row, (e, _) in enumerate(rows):
        quality[row, e] = 1
    unknown = np.full(shape, np.nan, np.float32)
    return Observations(
        ids=[str(i) for i in range(len(rows))],
        texts=[text for _, text in rows],
        tasks=[names[e] if tasks else "" for e, _ in rows],
        cards=[ExpertCard(name=name, description=INSTRUCTIONS[name]) for name in names],
        quality=quality,
        cost_usd=np.zeros(shape, np.float32),
        input_tokens=unknown,
        output_tokens=unknown,
        latency_s=unknown,
    )


def fitted(embedder: Embedder, table: Observations, **options: object) -> GliderRouter:
    router = create_router("glider", options, embedder=embedder).fit(table)
    assert isinstance(router, GliderRouter)
    return router


@pytest.fixture
def router(fake_embedder: Embedder) -> GliderRouter:
    return fitted(fake_embedder, observed(list(WORDS)))


def arrays(router: GliderRouter) -> dict[str, FloatArray]:
    return {name: np.asarray(array) for name, array in router._arrays().items()}


def test_a_written_instruction_is_compared_with_the_experts_instructions(
    router: GliderRouter, fake_embedder: Embedder
) -> None:
    same, other = router.guidance(["x", "y"], [INSTRUCTIONS["sums"], "translate to french"])
    cosines = (
        fake_embedder.embed([INSTRUCTIONS["sums"], "translate to french"])
        @ fake_embedder.embed([*INSTRUCTIONS.values()]).T
    )
    for guidance, row, alpha in ((same, cosines[0], 103), (other, cosines[1], 3)):  # alpha is each request's own
        assert list(guidance.scores.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert list(guidance.bias.values()) == pytest.approx((alpha * row).tolist(), abs=1e-3)
        assert guidance.source == "instruction"
    assert same.instruction == INSTRUCTIONS["sums"]


def test_a_query_stands_for_its_instruction_among_the_experts_examples(
    router: GliderRouter, fake_embedder: Embedder
) -> None:
    near, far = router.guidance([WORDS["cities"], "something else entirely"], [None, None])
    assert near.source == far.source == "query"
    table = observed(list(WORDS))
    cosines = fake_embedder.embed([WORDS["cities"]]) @ fake_embedder.embed(table.texts).T
    nearest = np.sort(cosines.reshape(3, 12), axis=1)[:, -3:].mean(1)
    assert list(near.scores.values()) == pytest.approx(nearest.tolist(), abs=1e-5)
    assert near.bias["cities"] == pytest.approx(103 * near.scores["cities"], rel=1e-5)
    assert far.bias["cities"] == pytest.approx(3 * far.scores["cities"], rel=1e-5)


def test_the_routers_quality_ranks_as_the_scores_do(router: GliderRouter) -> None:
    texts = [f"{WORDS['dates']} again", "other words"]
    quality = router.estimate([Query(text=text) for text in texts], router.cards).quality
    for row, guidance in zip(quality, router.guidance(texts, [None, None]), strict=True):
        np.testing.assert_allclose(2 * row - 1, [*guidance.scores.values()], atol=1e-6)


def test_an_experts_share_of_examples_passes_its_own_bound(fake_embedder: Embedder) -> None:
    half = fitted(fake_embedder, observed(list(WORDS)), sure_share=0.5)
    most = fitted(fake_embedder, observed(list(WORDS)), sure_share=0.9)
    assert (half._bounds >= most._bounds).all()
    few = fitted(fake_embedder, observed(list(WORDS), each=3))
    (guidance,) = few.guidance([f"{WORDS['dates']} item0"], [None])
    assert guidance.bias["dates"] == pytest.approx(3 * guidance.scores["dates"])  # too few to be sure of anything


def test_a_gate_is_left_the_best_adapters_alone(fake_embedder: Embedder) -> None:
    router = fitted(fake_embedder, observed(list(WORDS)), most_adapters=2)
    (guidance,) = router.guidance([WORDS["sums"]], [None])
    kept = sorted(guidance.scores, key=lambda name: -guidance.scores[name])[:2]
    assert {name for name, bias in guidance.bias.items() if bias > -np.inf} == set(kept)
    assert kept[0] == "sums"
    assert json.loads(json.dumps(guidance.gate_bias, allow_nan=False)).keys() == guidance.bias.keys()
    assert {name for name, bias in guidance.gate_bias.items() if bias is not None} == set(kept)


def test_an_experts_rows_do_not_depend_on_the_others(fake_embedder: Embedder) -> None:
    two, three = (fitted(fake_embedder, observed([*WORDS][:count]), examples=5) for count in (2, 3))
    for name, array in arrays(two).items():
        np.testing.assert_array_equal(arrays(three)[name][:2], array)


def test_of_many_experts_those_examples_count_that_set_one_apart(fake_embedder: Embedder) -> None:
    """Where all were asked, a question that all answer says nothing of any."""
    table = observed(list(WORDS))
    whole = np.where(np.isnan(table.quality), 0, table.quality)
    whole[::4] = 1
    router = fitted(fake_embedder, replace(table, quality=whole.astype(np.float32)))
    assert router._counts.tolist() == [9, 9, 9]


def test_save_and_load_keep_the_guidance(router: GliderRouter, fake_embedder: Embedder, tmp_path: Path) -> None:
    router.save(tmp_path)
    loaded = load_router(tmp_path, embedder=fake_embedder)
    assert isinstance(loaded, GliderRouter)
    asked = ["add these", "x"], [None, "calculate a sum"]
    assert loaded.guidance(*asked) == router.guidance(*asked)


# The label cannot reach the router


def test_labels_do_not_change_what_is_learnt(router: GliderRouter, fake_embedder: Embedder) -> None:
    table = observed(list(WORDS))
    names = {name: f"r{i}" for i, name in enumerate(reversed(table.ids))}
    blind = fitted(fake_embedder, observed(list(WORDS), tasks=False))
    wrong = replace(table, tasks=table.tasks[::-1], ids=[names[i] for i in table.ids])
    mixed = replace(table, tasks=np.random.default_rng(0).permutation(table.tasks).tolist())
    for other in (blind, fitted(fake_embedder, wrong), fitted(fake_embedder, mixed)):
        for name, array in arrays(router).items():
            np.testing.assert_array_equal(arrays(other)[name], array)


async def test_nothing_but_the_text_reaches_router_and_writer(router: GliderRouter) -> None:
    """Whatever a caller, or a data set, attaches to a query, the guidance is that of the bare text."""
    bare = Query(text="what is asked")
    told = Query(
        text="what is asked",
        tags=frozenset({"sums", "task:sums"}),
        session="sums",
        messages=[{"role": "user", "content": "what is asked", "name": "sums"}],
        input_tokens=7,
    )
    bodies: list[Any] = []

    async def call(expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
        bodies.append(request.body)
        for part in says("calculate a sum"):
            assert isinstance(part, Part)
            yield part

    for writer in (None, "writer"):
        found = [await Guide(router, writer=writer)(query, call) for query in (bare, told)]
        assert found[0] == found[1]
    assert bodies[0] == bodies[1]
    assert bodies[0]["messages"] == [{"role": "user", "content": prompt_for_query("what is asked")}]
    assert "sums" not in json.dumps(bodies)
    assert not {field.name for field in fields(Query)} & {"task", "tasks", "label", "labels", "skill", "skills"}


# The guide


async def test_an_instruction_is_written_once_for_a_question(router: GliderRouter) -> None:
    fleet = FakeFleet(writer=says('"calculate a sum"\nand more'))
    guide = Guide(router, writer="writer")
    query = Query(text="17 and 4")
    together = await asyncio.gather(*(guide(query, fleet) for _ in range(5)))
    again = await guide(query, fleet)
    assert fleet.called == ["writer"]
    assert all(guidance == again for guidance in together)
    assert again.instruction == "calculate a sum"
    assert again.source == "instruction"
    await guide(Query(text="17 and 5"), fleet)
    assert len(fleet.calls) == 2


@pytest.mark.parametrize("script", [[DEAD], says("  \n"), [3.0]], ids=["dead", "empty", "slow"])
async def test_a_writer_that_fails_leaves_the_query_and_is_asked_again(router: GliderRouter, script: Any) -> None:
    fleet = FakeFleet(writer=script)
    guide = Guide(router, writer="writer", timeout_s=0.05)
    guidance = await guide(Query(text=WORDS["sums"]), fleet)
    assert guidance.source == "query"
    assert guidance.instruction is None
    assert "'writer' wrote no instruction" in guidance.why
    fleet.scripts = {"writer": says("calculate a sum")}
    assert (await guide(Query(text=WORDS["sums"]), fleet)).source == "instruction"


async def test_where_the_caller_that_asks_leaves_the_next_one_asks(router: GliderRouter) -> None:
    """Whose call it is pays for it, so it ends with its caller; what others wait for does not."""
    fleet = FakeFleet(writer=[3600.0])
    guide = Guide(router, writer="writer")
    first, second, third = (asyncio.create_task(guide(Query(text="17 and 4"), fleet)) for _ in range(3))
    async with asyncio.timeout(10):
        while not fleet.calls:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        fleet.scripts = {"writer": says("calculate a sum")}
        first.cancel()
        assert (await second).instruction == (await third).instruction == "calculate a sum"
    assert fleet.called == ["writer", "writer"]


async def test_callers_wait_for_another_no_longer_than_for_the_writer(router: GliderRouter) -> None:
    fleet = FakeFleet(writer=[3600.0])
    guide = Guide(router, writer="writer", timeout_s=0.05)
    async with asyncio.timeout(10):
        found = await asyncio.gather(*(guide(Query(text="17 and 4"), fleet) for _ in range(4)))
    assert {guidance.source for guidance in found} == {"query"}


async def test_what_was_written_is_known_where_nobody_can_be_asked(router: GliderRouter) -> None:
    guide = Guide(router, writer="writer")
    query = Query(text="17 and 4")
    before = await guide(query)
    assert (before.source, "'writer' was not asked" in before.why) == ("query", True)
    written = await guide(query, FakeFleet(writer=says("calculate a sum")))
    assert await guide(query) == written
    assert written.source == "instruction"


async def test_without_a_writer_the_guidance_says_what_stood_in(router: GliderRouter) -> None:
    guidance = await Guide(router)(Query(text=WORDS["sums"]))
    assert guidance.source == "query"
    assert "no expert is configured" in guidance.why


async def test_only_what_was_asked_lately_is_remembered(router: GliderRouter) -> None:
    fleet = FakeFleet(writer=says("calculate a sum"))
    guide = Guide(router, writer="writer", remembered=2)
    for text in ("a", "b", "c", "c", "a"):
        await guide(Query(text=text), fleet)
    assert len(fleet.calls) == 4


def test_another_router_cannot_guide(fake_embedder: Embedder) -> None:
    with pytest.raises(RouterConfigError, match="not by 'best'"):
        Guide(create_router("best", embedder=fake_embedder))


@pytest.mark.parametrize(
    ("reply", "instruction"),
    [
        ("\n  Add two numbers.\nMore", "Add two numbers."),
        ('Instruction: "Add two numbers."', "Add two numbers."),
        ("word " * 100, " ".join(["word"] * 60)),
        ("'' \n", ""),
    ],
)
def test_what_counts_of_a_writers_reply(reply: str, instruction: str) -> None:
    assert clean_instruction(reply) == instruction


def test_prompts_are_bounded() -> None:
    assert len(prompt_for_query("x" * 100_000)) < 5_000
    assert len(prompt_for_examples([("q" * 9_000, "a" * 9_000)] * 5)) < 9_000
