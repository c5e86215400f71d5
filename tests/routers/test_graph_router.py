"""GraphRouter: served as its graph says, experts that join and leave, unknown tasks, options, resuming, samples."""

from __future__ import annotations

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
from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray, Observations, Query
from routers.embedder import Embedder
from routers.errors import ObservationError, RouterConfigError
from routers.graph_network import OBSERVED, GraphNetwork
from routers.graph_router import GraphRouter, GraphRouterConfig
from routers.graph_state import EFFECT, LENGTH
from routers.graph_training import Graph, TrainingOptions, train_network
from routers.registry import create_router, load_router
from training.metrics import REWARD_SETTINGS

FAST = {"steps": 40, "directions": 8}


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
    side, learnt = router._side, router._learnt
    network = GraphNetwork(torch.from_numpy(side.directions), side.tasks.shape[1], own=bool(learnt.own_gains.any()))
    parameters = {
        "tasks": side.tasks,
        "bias": side.bias,
        "log_task_counts_as": np.log(learnt.task_counts_as),
        "shared_gains": learnt.shared_gains,
        "own_gains": learnt.own_gains,
    }
    network.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()}, strict=False)
    return network.eval()


@pytest.mark.parametrize("options", [{}, {"own_directions": True}, {"task_nodes": "clusters"}, {"task_nodes": "none"}])
def test_serving_is_the_full_graphs_forward_pass(
    table: Observations, fake_embedder: Embedder, options: dict[str, Any]
) -> None:
    train, test = table.rows(np.arange(120)), table.rows(np.arange(120, 180))
    lengths = train.output_tokens * np.linspace(0.5, 1.5, 120, dtype=np.float32)[:, None]
    train = replace(train, output_tokens=np.where(np.arange(5) == 2, np.nan, lengths).astype(np.float32))
    router = make(fake_embedder, **options).fit(replace(train, input_tokens=np.full_like(lengths, np.nan)))
    features, asked = (router._features(part.texts, fake_embedder.embed(part.texts)) for part in (train, test))
    ratio = train.output_tokens / router.profile.output_tokens
    graph = Graph.of(features, np.zeros(120, np.int64), train.quality, ratio).part(np.arange(120))
    with torch.no_grad():
        forward = network_of(router)(graph, torch.from_numpy(asked)).numpy()
    attention = router._side.attention(asked)
    for outcome in (EFFECT, LENGTH):
        served = router._nodes.expected(outcome, attention, asked)
        np.testing.assert_allclose(served, forward[:, :, outcome], atol=1e-5)
    estimated = router.estimate(queries(test.texts), test.cards).quality
    inside = ((forward[:, :, EFFECT] >= 0) & (forward[:, :, EFFECT] <= 1)).all(1)
    assert inside.sum() > 30
    np.testing.assert_allclose(estimated[inside], forward[inside, :, EFFECT], atol=1e-5)


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


@pytest.mark.parametrize("killed_after", [1, 17, 39])
def test_a_killed_training_ends_with_the_same_parameters(tmp_path: Path, killed_after: int) -> None:
    graph, directions, options = random_graph(experts=4, queries=200), np.eye(12, 5, dtype=np.float32), OPTIONS
    whole = train_network(graph, directions, 3, options, Checkpoint())
    with pytest.raises(KilledError):
        train_network(graph, directions, 3, options, KilledCheckpoint(tmp_path, killed_after))
    resumed = train_network(graph, directions, 3, options, Checkpoint(tmp_path, every_s=0))
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
    assert all(1 / 3 <= guess.attention <= 1 for guess in found)


def test_an_unknown_task_is_read_off_the_nearest_and_says_so(router: GraphRouter, table: Observations) -> None:
    strange = "zyxw vutsr qponm lkjih gfedc"
    (guess,) = router.tasks([strange])
    assert not guess.known
    assert guess.task in table.tasks
    there, here = (router.estimate(queries([text]), table.cards[:3]) for text in (strange, table.texts[0]))
    assert there.uncertainty is not None
    assert here.uncertainty is not None
    assert there.uncertainty.mean() > 2 * here.uncertainty.mean()


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


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"loss": "one_hot", "alpha": 0, "beta": 0}, {"task_nodes": "many"}])
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RouterConfigError, match="graph_router"):
        create_router("graph_router", options)


def test_options_are_searchable() -> None:
    assert set(GraphRouter.search_space()) == {"learning_rate", "decay", "dropout", "directions"}
    assert GraphRouterConfig().loss == "effect"


# Samples of the graph

OPTIONS = TrainingOptions(
    steps=40, learning_rate=0.02, decay=3e-4, dropout=0.2, loss="effect", own_directions=True, seed=1
)


def random_graph(*, experts: int, queries: int) -> Graph:
    rng = np.random.default_rng(0)
    quality = rng.random((queries, experts)).astype(np.float32)
    quality[rng.random(quality.shape) < 0.5] = np.nan
    length: FloatArray = rng.random(quality.shape).astype(np.float32)
    length[::3] = np.nan
    x = rng.normal(size=(queries, 12)).astype(np.float32)
    return Graph.of(x, rng.integers(-1, 3, queries), quality, length)


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
    assert graph.part(np.zeros(0, np.int64))[OBSERVED].edge_index.shape == (2, 0)


def test_steps_sample_a_large_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routers.graph_training._QUERIES_PER_STEP", 40)
    drawn: list[int] = []
    real = Graph.part

    def part(graph: Graph, some: npt.NDArray[np.int64]) -> Any:
        drawn.append(len(some))
        return real(graph, some)

    monkeypatch.setattr(Graph, "part", part)
    train_network(random_graph(experts=6, queries=300), np.eye(12, 5, dtype=np.float32), 3, OPTIONS, Checkpoint())
    assert max(drawn) <= 40


@pytest.mark.parametrize("path", sorted(Path("deploy/routers").glob("graph-*.yaml")), ids=lambda path: path.stem)
def test_the_papers_settings_are_options_of_this_router(path: Path) -> None:
    config = GraphRouterConfig.model_validate(yaml.safe_load(path.read_text("utf-8")))
    weights = REWARD_SETTINGS[path.stem.removeprefix("graph-").replace("-", "_")]
    assert (config.loss, (config.alpha, config.beta)) == ("one_hot", weights)
