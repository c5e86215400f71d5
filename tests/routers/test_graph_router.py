"""GraphRouter: served as its graph says, experts that join and leave, unknown tasks, options, resuming, samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from experts.cards import ExpertCard
from routers import artefact as artefacts
from routers.artefact import AnyArray
from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray, Observations, Query
from routers.embedder import Embedder
from routers.errors import ObservationError, RouterConfigError
from routers.graph_network import OBSERVED, OF, GraphNetwork
from routers.graph_router import GraphRouter, GraphRouterConfig, is_best
from routers.graph_state import EFFECT, LENGTH
from routers.graph_training import Graph, TrainingOptions, train_network
from routers.registry import create_router, load_router
from training.metrics import REWARD_SETTINGS

FAST = {"steps": 40, "width": 16}


def queries(texts: Any) -> list[Query]:
    return [Query(text=text) for text in texts]


def make(embedder: Embedder, **options: Any) -> GraphRouter:
    router = create_router("graph_router", {**FAST, **options}, embedder=embedder)
    assert isinstance(router, GraphRouter)
    return router


@pytest.fixture
def router(table: Observations, fake_embedder: Embedder) -> GraphRouter:
    return make(fake_embedder).fit(table)


def network_of(router: GraphRouter) -> GraphNetwork:
    """The trained network, from what the router serves with."""
    tasks = router._tasks
    network = GraphNetwork(torch.from_numpy(tasks.projection), len(tasks.nodes))
    parameters = {
        "projection": tasks.projection,
        "offsets": tasks.offsets,
        "bias": tasks.bias,
        "log_task_counts_as": np.log(router._task_counts_as),
        "link": router._link,
    }
    network.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
    return network.eval()


ONE_HOT = {"loss": "one_hot", "alpha": 0.5, "beta": 0.5}


@pytest.mark.parametrize(
    ("options", "labelled"),
    [({}, True), ({"task_descriptions": {"sums": "adding numbers"}}, True), (ONE_HOT, True), ({}, False)],
    ids=["labels", "described", "one-hot", "clusters"],
)
def test_serving_is_the_full_graphs_forward_pass(
    table: Observations, fake_embedder: Embedder, options: dict[str, Any], labelled: bool
) -> None:
    train, test = table.rows(np.arange(120)), table.rows(np.arange(120, 180))
    lengths = train.output_tokens * np.linspace(0.5, 1.5, 120, dtype=np.float32)[:, None]
    train = replace(train, output_tokens=np.where(np.arange(5) == 2, np.nan, lengths).astype(np.float32))
    train = replace(
        train, tasks=["" if i % 5 == 4 else task for i, task in enumerate(train.tasks)] if labelled else [""] * 120
    )
    router = make(fake_embedder, **options).fit(replace(train, input_tokens=np.full_like(lengths, np.nan)))
    embeddings, asked_embeddings = (fake_embedder.embed(part.texts) for part in (train, test))
    label, names = router._labels(train, embeddings)
    graph = Graph.of(
        router._features(train.texts, embeddings),
        label,
        router._task_descriptions(names),
        router._effects(train)[0],
        train.output_tokens / router.profile.output_tokens,
    ).part(np.arange(120))
    assert graph["task"].num_nodes == len(router.task_nodes) >= (3 if labelled else 2)
    assert graph["task"].described.sum() == (labelled and "task_descriptions" in options)
    asked = router._features(test.texts, asked_embeddings)
    with torch.no_grad():
        forward = network_of(router)(graph, torch.from_numpy(asked)).numpy()
    membership = router._membership(test.texts, asked_embeddings)
    for outcome in (EFFECT, LENGTH):
        served = router._nodes.expected(outcome, membership)
        np.testing.assert_allclose(served, forward[:, :, outcome], atol=1e-5)
    estimated = router.estimate(queries(test.texts), test.cards).quality
    effect = forward[:, :, EFFECT]
    if "loss" in options:
        effect = 1 / (1 + np.exp(-(router._link[0] * effect + router._link[1])))
    inside = ((effect >= 0) & (effect <= 1)).all(1)
    assert inside.sum() > 30
    np.testing.assert_allclose(estimated[inside], effect[inside], atol=1e-5)


def test_specialists_are_found(table: Observations, fake_embedder: Embedder) -> None:
    train, test = table.rows(np.arange(120)), table.rows(np.arange(120, 180))
    found = make(fake_embedder).fit(train).estimate(queries(test.texts), test.cards)
    own = np.array([("dates", "sums", "cities").index(task) for task in test.tasks])
    assert (found.quality[:, :3].argmax(axis=1) == own).mean() > 0.9
    assert found.quality[:, 3].mean() == pytest.approx(0.7, abs=0.12)
    np.testing.assert_allclose(found.cost_usd.mean(0), np.nanmean(train.cost_usd, axis=0), rtol=0.2)


def test_a_query_alone_is_estimated_as_in_a_batch(router: GraphRouter, table: Observations) -> None:
    batch = router.estimate(queries(table.texts[:9]), table.cards)
    for row in range(9):
        alone = router.estimate(queries(table.texts[row : row + 1]), table.cards)
        np.testing.assert_allclose(alone.quality[0], batch.quality[row], atol=2e-6)
        np.testing.assert_allclose(alone.cost_usd[0], batch.cost_usd[row], rtol=1e-5)


def test_no_queries(router: GraphRouter, cards: list[ExpertCard]) -> None:
    assert router.estimate([], cards).quality.shape == (0, len(cards))


def test_answer_lengths_differ_between_tasks(table: Observations, fake_embedder: Embedder) -> None:
    longer = np.array([4.0 if task == "sums" else 1.0 for task in table.tasks], np.float32)[:, None]
    long = replace(table, output_tokens=table.output_tokens * longer)
    router = make(fake_embedder).fit(long)
    sums, dates = (router.estimate(queries([table.texts[i]]), table.cards) for i in (1, 0))
    assert (sums.latency_s > 2 * dates.latency_s).all()


def test_two_experts_above_one_stay_apart(router: GraphRouter, table: Observations, monkeypatch: Any) -> None:
    raised = replace(router._nodes, tasks=router._nodes.tasks + np.array([0.8, 0], np.float32)[:, None, None])
    before = router.estimate(queries(table.texts[:20]), table.cards).quality
    monkeypatch.setattr(router, "_nodes", raised)
    after = router.estimate(queries(table.texts[:20]), table.cards).quality
    assert after.max(1) == pytest.approx(np.ones(20))
    np.testing.assert_array_equal(after.argsort(1)[:, -2:], before.argsort(1)[:, -2:])
    assert (np.sort(after, 1)[:, -2] < 1).all()


# Seeds, files


def test_the_same_seed_gives_the_same_router(table: Observations, fake_embedder: Embedder, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(fake_embedder, seed=seed).fit(table).save(tmp_path / name)
    one, two, other = ((tmp_path / name / "router.safetensors").read_bytes() for name in "abc")
    assert one == two != other


def test_save_and_load_with_an_expert_that_joined(router: GraphRouter, table: Observations, tmp_path: Path) -> None:
    router.add_expert(NEW, observed(table, "cities-expert", range(40)))
    router.add_expert(UNSEEN)
    router.save(tmp_path)
    loaded = load_router(tmp_path, embedder=router._used_embedder())
    assert isinstance(loaded, GraphRouter)
    cards = [*table.cards, NEW, UNSEEN]
    one, two = (found.estimate(queries(table.texts[:30]), cards) for found in (router, loaded))
    for name in ("quality", "cost_usd", "latency_s", "uncertainty"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert loaded.tasks(table.texts[:5]) == router.tasks(table.texts[:5])
    loaded.add_expert(NEW, observed(table, "base", range(40)))  # it still knows who joined
    assert [card.name for card in loaded.cards].count(NEW.name) == 1


def change(folder: Path, **arrays: Any) -> None:
    """Put other arrays into an artefact; None takes one out."""
    found = artefacts.read(folder)
    changed = {**found.arrays, **{f"graph.{name}": value for name, value in arrays.items()}}
    header = {key: value for key, value in found.header.items() if key not in ("arrays", "sha256")}
    artefacts.write(folder, header, {name: array for name, array in changed.items() if array is not None})


def told(nodes: Any) -> AnyArray:
    return np.frombuffer(json.dumps(nodes).encode(), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"task_nodes": told([])}, "has no task nodes"),
        ({"task_nodes": told(["sums", "dates", "cities"])}, "does not say what its task nodes are"),
        ({"task_nodes": told([{"name": 1, "made_of": "queries", "nearest": {}}])}, "does not say what its task nodes"),
        ({"task_nodes": told([{"name": "a", "made_of": "queries", "nearest": {}}])}, "'graph.task_features' in shape"),
        ({"centre": np.zeros(3, np.float32)}, "'graph.centre' in shape"),
        ({"task_states": np.full((2, 3, 5), np.nan, np.float32)}, "unknown values in array 'graph.task_states'"),
        ({"trained_on": np.array([6])}, "was trained on 6 of its 5 experts"),
        ({"link": None}, "lacks the array 'graph.link'"),
    ],
)
def test_an_artefact_that_cannot_be_this_router_is_refused(
    router: GraphRouter, tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    router.save(tmp_path)
    change(tmp_path, **arrays)
    with pytest.raises(RouterConfigError, match=says):
        load_router(tmp_path, embedder=router._used_embedder())


def test_text_features_of_another_size_are_refused(router: GraphRouter, tmp_path: Path) -> None:
    router._text = router._text.words_through(np.zeros((router._text.projection.shape[1] - 1, 2), np.float32))
    router.save(tmp_path)
    with pytest.raises(RouterConfigError, match=r"'graph.centre' in shape"):
        load_router(tmp_path, embedder=router._used_embedder())


@pytest.mark.parametrize("killed_after", [1, 17, 39])
def test_a_killed_training_ends_with_the_same_parameters(tmp_path: Path, killed_after: int) -> None:
    graph = random_graph(experts=4, queries=200)
    whole = train_network(graph, fresh(), OPTIONS, Checkpoint())
    with pytest.raises(KilledError):
        train_network(graph, fresh(), OPTIONS, KilledCheckpoint(tmp_path, killed_after))
    resumed = train_network(graph, fresh(), OPTIONS, Checkpoint(tmp_path, every_s=0))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


class KilledError(Exception):
    """Stands for a kill in the middle of a fit."""


class KilledCheckpoint(Checkpoint):
    """Keeps every step, until the process is 'killed' after some."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, every_s=0)
        self._after = after

    def step(self, done: int, total: int, arrays: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> None:
        super().step(done, total, arrays)
        if done == self._after:
            raise KilledError


# Experts that join and leave

NEW = ExpertCard(name="new", description="rivers and cities", input_price=2, output_price=8)
UNSEEN = ExpertCard(name="unseen", description="knows of everything", input_price=9, output_price=40)


def observed(table: Observations, expert: str, rows: range, card: ExpertCard = NEW) -> Observations:
    """Some observations of `expert` as those of `card`."""
    column = [c.name for c in table.cards].index(expert)
    part = table.rows(np.array(rows))
    arrays = ("quality", "cost_usd", "input_tokens", "output_tokens", "latency_s")
    return replace(part, cards=[card], **{name: getattr(part, name)[:, [column]] for name in arrays})


def test_an_expert_joins_by_its_edges_and_nobody_else_changes(router: GraphRouter, table: Observations) -> None:
    asked = queries(table.texts[100:])
    before = router.estimate(asked, table.cards)
    router.add_expert(NEW, observed(table, "cities-expert", range(60)))
    after = router.estimate(asked, [*table.cards, NEW])
    np.testing.assert_array_equal(after.quality[:, :-1], before.quality)
    cities = np.array([task == "cities" for task in table.tasks[100:]])
    assert after.quality[cities, -1].mean() > after.quality[~cities, -1].mean() + 0.3
    twin = [card.name for card in table.cards].index("cities-expert")
    assert np.abs(after.quality[:, -1] - after.quality[:, twin]).mean() < 0.12
    assert after.cost_usd[:, -1].mean() == pytest.approx(
        2 * before.cost_usd[:, twin].mean(), rel=0.3
    )  # twice the price


def test_an_expert_that_joins_above_one_moves_nobody(router: GraphRouter, table: Observations) -> None:
    asked = queries(table.texts)
    before = router.estimate(asked, table.cards).quality
    like_cities = table.cards[2].model_copy(update={"name": "always right on dates"})
    dates = observed(table, "base", range(0, 180, 3), like_cities)
    router.add_expert(like_cities, replace(dates, quality=np.ones_like(dates.quality)))
    membership = router._membership(table.texts, router._used_embedder().embed(table.texts))
    assert router._nodes.expected(EFFECT, membership)[:, -1].max() > 1.1
    after = router.estimate(asked, [*table.cards, like_cities]).quality
    np.testing.assert_array_equal(after[:, :-1], before)
    assert after[:, -1].max() == 1


def test_a_node_of_all_its_edges_is_the_one_that_training_made(table: Observations, fake_embedder: Embedder) -> None:
    router = make(fake_embedder).fit(table)
    twin = table.cards[2].model_copy(update={"name": "twin"})
    router.add_expert(twin, observed(table, table.cards[2].name, range(180), twin))
    found = router.estimate(queries(table.texts), [table.cards[2], twin]).quality
    np.testing.assert_allclose(found[:, 1], found[:, 0], atol=0.1)  # but for their priors


def test_joining_again_replaces(router: GraphRouter, table: Observations) -> None:
    router.add_expert(UNSEEN)
    router.add_expert(NEW, observed(table, "cities-expert", range(60)))
    router.add_expert(NEW, observed(table, "base", range(60)))
    again = router.estimate(queries(table.texts), [NEW, UNSEEN]).quality
    other = make(router._used_embedder()).fit(table)
    other.add_expert(UNSEEN)
    other.add_expert(NEW, observed(table, "base", range(60)))
    np.testing.assert_allclose(other.estimate(queries(table.texts), [NEW, UNSEEN]).quality, again, atol=1e-6)
    router.add_expert(NEW)  # back to its card alone
    assert [card.name for card in router.cards] == [card.name for card in table.cards]


def test_an_expert_that_cannot_join_again_stays_as_it_was(router: GraphRouter, table: Observations) -> None:
    router.add_expert(NEW, observed(table, "cities-expert", range(60)))
    asked, cards = queries(table.texts[:30]), [*table.cards, NEW]
    before = router.estimate(asked, cards)
    wrong = observed(table, "base", range(60))
    with pytest.raises(ObservationError, match=r"quality lies in 0\.\.1"):
        router.add_expert(NEW, replace(wrong, quality=wrong.quality + 1))
    with pytest.raises(ObservationError, match="no expert 'new'"):
        router.add_expert(NEW, table)
    assert [card.name for card in router.cards] == [card.name for card in cards]
    np.testing.assert_array_equal(router.estimate(asked, cards).quality, before.quality)


def test_removal_needs_nothing(router: GraphRouter, table: Observations) -> None:
    whole = router.estimate(queries(table.texts[:9]), table.cards).quality
    rest = router.estimate(queries(table.texts[:9]), table.cards[1:]).quality
    np.testing.assert_array_equal(rest, whole[:, 1:])


def test_an_expert_that_nobody_has_seen_promises_less(table: Observations, fake_embedder: Embedder) -> None:
    bold, careful = (make(fake_embedder, caution=caution).fit(table) for caution in (0, 1))
    one, two = (found.estimate(queries(table.texts), [UNSEEN]).quality for found in (bold, careful))
    assert (two <= one).all()
    assert two.mean() < one.mean() - 0.1


def test_an_expert_trained_on_cannot_join(router: GraphRouter, table: Observations) -> None:
    with pytest.raises(RouterConfigError, match="fitted on 'base' already"):
        router.add_expert(table.cards[-1], table)
    with pytest.raises(ObservationError, match="no expert 'new'"):
        router.add_expert(NEW, table)


# Tasks


def test_tasks_are_read_off_the_text(router: GraphRouter, table: Observations) -> None:
    found = router.tasks(table.texts)
    assert np.mean([guess.task == task for guess, task in zip(found, table.tasks, strict=True)]) > 0.95
    assert np.mean([guess.known for guess in found]) > 0.95
    assert {guess.made_of for guess in found if guess.known} == {"queries"}
    assert {type(guess.known) for guess in found} == {bool}  # so that it can be written as JSON
    for guess in found:
        assert next(iter(guess.nearest)) == guess.task
        assert sum(guess.nearest.values()) == pytest.approx(1, abs=0.03)


def test_an_unknown_query_is_read_off_the_nearest_tasks_and_says_so(router: GraphRouter, table: Observations) -> None:
    strange = "zyxw vutsr qponm lkjih gfedc"
    (guess,) = router.tasks([strange])
    assert (guess.known, guess.made_of) == (False, "nearest tasks")
    assert guess.task in table.tasks
    there, here = (router.estimate(queries([text]), table.cards[:3]) for text in (strange, table.texts[0]))
    assert there.uncertainty is not None
    assert here.uncertainty is not None
    assert there.uncertainty.mean() > 2 * here.uncertainty.mean()


COUNTS = [
    "sum population total of country plus city",
    "add population number of europe and asia",
    "total country digits map plus",
    "subtract city number in europe",
]


@pytest.mark.parametrize(
    ("given", "made_of"),
    [
        ({"description": COUNTS[0]}, "description"),
        ({"examples": COUNTS}, "nearest tasks"),
    ],
)
def test_an_unknown_task_gets_a_node_and_says_what_it_is_made_of(
    router: GraphRouter, table: Observations, tmp_path: Path, given: dict[str, Any], made_of: str
) -> None:
    asked, known = queries(table.texts), router.task_nodes
    before, share = router.estimate(asked, table.cards), router.tasks([COUNTS[0]])[0].nearest.get("counts", 0)
    node = router.add_task("counts", **given)
    assert (node.name, node.made_of, share) == ("counts", made_of, 0)
    assert router.task_nodes == (*known, node)
    assert set(node.nearest) <= set(table.tasks)
    assert sum(node.nearest.values()) == pytest.approx(1, abs=0.03)
    there = router._tasks.membership(router._tasks.features[[-1]])[0]
    assert there.argmax() == len(known)
    if "examples" in given:
        assert router.tasks([COUNTS[0]])[0].task == "counts"
    # what its nearest tasks show of each expert, and nothing of its own
    shown = sum(
        share * router._nodes.tasks[EFFECT][[n.name for n in known].index(task)] for task, share in node.nearest.items()
    )
    np.testing.assert_allclose(router._nodes.tasks[EFFECT][-1], shown, atol=0.02)
    assert (router._nodes.counts[-1] == 0).all()
    after = router.estimate(asked, table.cards)
    assert np.abs(after.quality - before.quality).mean() < 0.05  # who asks for what was known hardly notices
    router.add_expert(NEW, observed(table, "cities-expert", range(60)))
    router.save(tmp_path)
    loaded = load_router(tmp_path, embedder=router._used_embedder())
    assert isinstance(loaded, GraphRouter)
    assert loaded.task_nodes == router.task_nodes
    one, two = (found.estimate(asked, [*table.cards, NEW]).quality for found in (router, loaded))
    np.testing.assert_array_equal(one, two)


def test_described_tasks_of_the_options_are_nodes(table: Observations, fake_embedder: Embedder) -> None:
    options = {"task_descriptions": {"sums": "adding numbers", "counts": "total population of city plus country"}}
    nodes = {node.name: node for node in make(fake_embedder, **options).fit(table).task_nodes}
    assert {name: node.made_of for name, node in nodes.items()} == {
        "cities": "queries", "dates": "queries", "sums": "queries", "counts": "description",
    }  # fmt: skip
    assert nodes["counts"].nearest


def test_a_task_that_cannot_be_added(router: GraphRouter, table: Observations) -> None:
    for given in ({}, {"description": "counts", "examples": COUNTS}):
        with pytest.raises(RouterConfigError, match="a description or examples"):
            router.add_task("counts", **given)
    with pytest.raises(RouterConfigError, match="knows a task 'sums' already"):
        router.add_task("sums", "adding numbers")


@pytest.mark.parametrize("tasks", [[""] * 180, ["all"] * 180])
def test_without_labels_tasks_are_clusters(table: Observations, fake_embedder: Embedder, tasks: list[str]) -> None:
    router = make(fake_embedder).fit(replace(table, tasks=tasks))
    assert {guess.task for guess in router.tasks(table.texts)} == {"0", "1", "2"}
    quality = router.estimate(queries(table.texts), table.cards).quality
    own = np.array([("dates", "sums", "cities").index(task) for task in table.tasks])
    assert (quality[:, :3].argmax(axis=1) == own).mean() > 0.8


def test_a_query_without_a_label_trains_all_the_same(table: Observations, fake_embedder: Embedder) -> None:
    some = ["" if i % 4 else task for i, task in enumerate(table.tasks)]
    found = make(fake_embedder).fit(replace(table, tasks=some)).tasks(table.texts)
    assert np.mean([guess.task == task for guess, task in zip(found, table.tasks, strict=True)]) > 0.8


def test_few_labels_and_few_observed_queries_train_all_the_same(table: Observations, fake_embedder: Embedder) -> None:
    """Halves of a step then have no labelled query, or would have no edge."""
    few = replace(table, tasks=["dates", "sums", *[""] * 178])
    sparse = replace(table, quality=np.where(np.arange(180)[:, None] % 60 < 1, table.quality, np.nan))
    for some in (few, sparse):
        router = make(fake_embedder, steps=60).fit(some)
        untrained = float(fresh().log_task_counts_as[EFFECT].detach().exp())
        assert abs(router._task_counts_as[EFFECT] - untrained) > 0.1
        assert np.isfinite(router.estimate(queries(table.texts), table.cards).quality).all()


# The paper's loss


def test_one_hot_says_who_is_best_at_one_weighing(table: Observations, fake_embedder: Embedder) -> None:
    whole = replace(table, quality=np.nan_to_num(table.quality, nan=0.0))
    frugal = make(fake_embedder, loss="one_hot", alpha=0.2, beta=0.8, steps=150).fit(whole)
    best = make(fake_embedder, loss="one_hot", alpha=1, beta=0, steps=150).fit(whole)
    one, two = (found.estimate(queries(table.texts), table.cards).quality for found in (frugal, best))
    assert (one.argmax(1) != 3).mean() > 0.95  # the generalist costs ten times as much
    own = np.array([("dates", "sums", "cities").index(task) for task in table.tasks])
    assert (two[:, :3].argmax(1) == own).mean() > 0.8
    with pytest.raises(RouterConfigError, match="one_hot an expert cannot join"):
        best.add_expert(NEW, observed(table, "base", range(20)))


def test_the_papers_loss_teaches_however_wrong_an_estimate_is() -> None:
    network = fresh(link=True)
    with torch.no_grad():
        network.link.copy_(torch.tensor([60.0, 90.0]))  # every chance is 1 to the last bit
    options, graph = replace(OPTIONS, loss="one_hot", steps=30), random_graph(experts=4, queries=200)
    best = replace(graph, target=(graph.target > 0.5).astype(np.float32))
    trained = train_network(best, network, options, Checkpoint())
    assert float(trained.link.detach()[1]) < 89.9


def test_who_was_best_is_known_without_every_cost(table: Observations) -> None:
    some = table.rows(np.arange(40))
    unknown = replace(some, cost_usd=np.where(np.arange(5) == 3, np.nan, some.cost_usd).astype(np.float32))
    seen = np.isfinite(some.quality)
    for beta in (0.0, 0.5):
        np.testing.assert_array_equal(np.isfinite(is_best(unknown, 1.0, beta)), seen)
    np.testing.assert_array_equal(is_best(unknown, 1.0, 0.0), is_best(some, 1.0, 0.0))
    nowhere = replace(some, cost_usd=np.full_like(some.cost_usd, np.nan))
    np.testing.assert_array_equal(is_best(nowhere, 0.5, 0.5), is_best(some, 1.0, 0.0))
    gaps = replace(some, cost_usd=np.where(np.arange(40)[:, None] % 4 == 0, np.nan, some.cost_usd).astype(np.float32))
    assert (is_best(gaps, 0.2, 0.8)[seen] == is_best(some, 0.2, 0.8)[seen]).mean() > 0.9


@pytest.mark.parametrize(
    "options", [{"beta": 0.5}, {"loss": "one_hot", "alpha": 0, "beta": 0}, {"task_descriptions": {"a": ""}}]
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RouterConfigError, match="graph_router"):
        create_router("graph_router", options)


def test_options_are_searchable() -> None:
    assert set(GraphRouter.search_space()) == {"learning_rate", "decay", "dropout", "width"}
    assert GraphRouterConfig().loss == "effect"


# Samples of the graph

OPTIONS = TrainingOptions(steps=40, learning_rate=0.02, decay=3e-4, dropout=0.2, loss="effect", seed=1)


def fresh(*, link: bool = False) -> GraphNetwork:
    return GraphNetwork(torch.eye(12, 5), 3, dropout=OPTIONS.dropout, link=link)


def random_graph(*, experts: int, queries: int) -> Graph:
    rng = np.random.default_rng(0)
    quality = rng.random((queries, experts)).astype(np.float32)
    quality[rng.random(quality.shape) < 0.5] = np.nan
    length: FloatArray = rng.random(quality.shape).astype(np.float32)
    length[::3] = np.nan
    x = rng.normal(size=(queries, 12)).astype(np.float32)
    descriptions = np.where(np.arange(3)[:, None] == 1, rng.normal(size=(3, 12)), np.nan).astype(np.float32)
    return Graph.of(x, rng.integers(-1, 3, queries), descriptions, quality, length)


def test_a_sample_has_the_edges_of_its_queries() -> None:
    graph = random_graph(experts=6, queries=50)
    drawn = np.array([7, 3, 44])
    part = graph.part(drawn)
    query, expert = part[OBSERVED].edge_index.numpy()
    whole = [(q, int(e)) for q in drawn for e in graph.expert[graph.first[q] : graph.first[q + 1]]]
    assert [(drawn[q], e) for q, e in zip(query, expert, strict=True)] == whole
    expected = np.concatenate([graph.outcome[graph.first[q] : graph.first[q + 1]] for q in drawn])
    np.testing.assert_array_equal(part[OBSERVED].edge_attr.numpy(), expected)
    np.testing.assert_array_equal(part["query"].x.numpy(), graph.x[drawn])
    of = [(row, int(graph.label[q])) for row, q in enumerate(drawn) if graph.label[q] >= 0]
    assert [tuple(edge) for edge in part[OF].edge_index.numpy().T] == of
    assert part["task"].described.tolist() == [0, 1, 0]
    assert part.validate()
    nothing = graph.part(np.zeros(0, np.int64))
    assert nothing[OBSERVED].edge_index.shape == nothing[OF].edge_index.shape == (2, 0)


def test_task_nodes_are_messages_from_their_queries_and_descriptions() -> None:
    graph = random_graph(experts=4, queries=60)
    tasks = fresh().tasks(graph.part(np.arange(60))).detach().numpy()
    for task in range(3):
        own = graph.x[graph.label == task]
        told = np.repeat(graph.descriptions[[task]], 8, axis=0) if task == 1 else own[:0]
        np.testing.assert_allclose(tasks[task], np.vstack([own, told]).mean(0), atol=1e-5)
    few = graph.part(np.flatnonzero(graph.label == 0))
    network = fresh().eval()
    belongs = network.log_membership(few["query"].x, network.tasks(few)).exp().detach().numpy()
    assert (belongs[:, 2] == 0).all()  # nothing is known of that task here
    np.testing.assert_allclose(belongs.sum(1), 1, atol=1e-5)


def test_steps_sample_a_large_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routers.graph_training._QUERIES_PER_STEP", 40)
    drawn: list[int] = []
    real = Graph.part

    def part(graph: Graph, some: npt.NDArray[np.int64]) -> Any:
        drawn.append(len(some))
        return real(graph, some)

    monkeypatch.setattr(Graph, "part", part)
    train_network(random_graph(experts=6, queries=300), fresh(), OPTIONS, Checkpoint())
    assert max(drawn) <= 40


@pytest.mark.parametrize("path", sorted(Path("deploy/routers").glob("graph-*.yaml")), ids=lambda path: path.stem)
def test_the_papers_settings_are_options_of_this_router(path: Path) -> None:
    config = GraphRouterConfig.model_validate(yaml.safe_load(path.read_text("utf-8")))
    weights = REWARD_SETTINGS[path.stem.removeprefix("graph-").replace("-", "_")]
    assert (config.loss, (config.alpha, config.beta)) == ("one_hot", weights)
