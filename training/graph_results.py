"""Make every figure of docs/graph_router.md again: `python -m training.graph_results`.

As `training.results` does for the baselines: one JSON file per experiment in docs/results, each with its command.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experts.cards import ExpertCard
from routers.contracts import Estimates, FloatArray, Observations, Query
from routers.embedder import Embedder, shared_embedder
from routers.registry import AnyRouter, create_router
from training.doc_tables import fill_tables, markdown
from training.evaluation import Bench, Evaluation, mean_over_seeds
from training.left_out import add_some
from training.metrics import REWARD_SETTINGS, Floats
from training.observations import Table, load_table
from training.report import Json, interval
from training.results import BASELINES, RESULTS, data_folder, write

TABLES = ("frontier15", "open9", "pair-mmlu")
SEEDS = range(5)
SETTINGS = Path("deploy/routers")
DOCUMENT = Path("docs/graph_router.md")

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "task nodes from clusters, not from labels": {"task_nodes": "clusters"},
    "no task nodes": {"task_nodes": "none"},
    "edges that say only who was best": {"loss": "one_hot"},
    "with messages along each expert's own directions": {"own_directions": True},
    "one direction instead of 32": {"directions": 1},
}
_PLAIN_KNN: Mapping[str, Any] = {"k": 100, "temperature": 0.2, "text_weight": 0}
"""kNN on embeddings alone, as the field knows it."""

_FIGURES = ("aiq", "quality", "performance_first", "balance", "cost_first")
_SCALE = {"experts": 1000, "queries": 100_000, "each": 10}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments named, or all."""
    parser = argparse.ArgumentParser(prog="python -m training.graph_results", description=__doc__)
    parser.add_argument("experiment", nargs="*", choices=["", *_EXPERIMENTS], help="by default all of them")
    for name in parser.parse_args(arguments).experiment or _EXPERIMENTS:
        write(f"graph-{name}", _EXPERIMENTS[name](), command=f"python -m training.graph_results {name}")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")


def with_tables(document: str) -> str:
    """`document` with its comparisons made from the JSON files that there are."""

    def table_of(name: str) -> str | None:
        path = RESULTS / f"{name}.json"
        return _comparison(json.loads(path.read_bytes())["results"]) if path.is_file() else None

    return fill_tables(document, table_of)


def _comparison(results: Json) -> str:
    keys = ("aiq", "performance_first", "balance", "cost_first")
    head = ["AIQ", "Performance First", "Balance", "Cost First"]

    def rows(found: Json, style: str) -> list[list[str]]:
        return [
            [
                name,
                *(
                    f"{one[key]['value']:{style}} ({one[key]['low']:{style}} to {one[key]['high']:{style}})"
                    for key in keys
                ),
            ]
            for name, one in found.items()
        ]

    return "\n\n".join([
        markdown(["router", *head], rows(results["routers"], ".3f")),
        markdown(["graph_router less", *head], rows(results["graph_router_less"], "+.4f")),
    ])  # fmt: skip


def _fitted(table: Table, name: str, options: Mapping[str, Any], *, embedder: Embedder | None = None) -> AnyRouter:
    return create_router(name, options, embedder=embedder).fit(table.train)


def _measured(bench: Bench, table: Table, name: str, seeds: Sequence[int], options: Mapping[str, Any]) -> Evaluation:
    runs = []
    for seed in seeds:
        _say(f"{name}, seed {seed}, {dict(options)}")
        runs.append(bench.measure_router(_fitted(table, name, {**options, "seed": seed})))
    return mean_over_seeds(runs)


def _figures_of(measured: Evaluation) -> dict[str, Floats]:
    found = {**measured.figures, **measured.rewards}
    return {name: found[name] for name in _FIGURES}


def _compared(name: str) -> Json:
    """Each router on a table, and GraphRouter less each baseline, paired."""
    table = load_table(data_folder(name))
    bench = Bench(table)
    found = {router: _figures_of(_measured(bench, table, router, SEEDS, {})) for router in (*BASELINES, "graph_router")}
    found["knn of 100"] = _figures_of(_measured(bench, table, "knn", SEEDS[:1], _PLAIN_KNN))
    graph = found["graph_router"]
    return {
        "routers": {router: _intervals(figures) for router, figures in found.items()},
        "graph_router_less": {
            router: _intervals({key: graph[key] - found[router][key] for key in _FIGURES})
            for router in found
            if router != "graph_router"
        },
    }


def _intervals(figures: Mapping[str, Floats]) -> Json:
    return {name: interval(values) for name, values in figures.items()}


def _ablation() -> Json:
    """GraphRouter with parts changed, less as it is, paired, on the two tables of many experts."""
    found: Json = {}
    for name in ("frontier15", "open9"):
        table = load_table(data_folder(name))
        bench = Bench(table)
        runs = {what: _measured(bench, table, "graph_router", (0,), options) for what, options in _VARIANTS.items()}
        whole = runs["as it is"]
        found[name] = {
            what: {
                **_intervals({"aiq": run.figures["aiq"], "less_as_it_is": run.figures["aiq"] - whole.figures["aiq"]}),
                "balance_less_as_it_is": interval(run.rewards["balance"] - whole.rewards["balance"]),
                "ece": interval(run.calibration.error) if run.calibration else None,
            }
            for what, run in runs.items()
        }
    return found


def _one_hot() -> Json:
    """The paper's loss, one router for each setting, beside one router for all of them, on open9."""
    found: Json = {}
    for name in ("open9",):
        table = load_table(data_folder(name))
        bench = Bench(table)
        whole = _measured(bench, table, "graph_router", (0,), {})
        found[name] = {setting: _at_setting(bench, table, setting, whole) for setting in REWARD_SETTINGS}
    return found


def _at_setting(bench: Bench, table: Table, setting: str, whole: Evaluation) -> Json:
    options = yaml.safe_load((SETTINGS / f"graph-{setting.replace('_', '-')}.yaml").read_text("utf-8"))
    _say(f"one_hot, {setting}")
    queries = [Query(text=text) for text in table.test.texts]
    estimates = _fitted(table, "graph_router", options).estimate(queries, table.test.cards)
    # Its score has the cost in it already, so it chooses by that alone.
    alone = replace(estimates, cost_usd=np.zeros_like(estimates.cost_usd))
    one_hot = bench.measure("graph_router", alone).rewards[setting]
    both = {"one_hot": one_hot, "one_for_all": whole.rewards[setting]}
    return _intervals({**both, "one_for_all_less_one_hot": whole.rewards[setting] - one_hot})


def _cold_start() -> Json:
    """Each expert of open9 left out in turn: never added, added by its card, added with 16 observations."""
    table = load_table(data_folder("open9"))
    bench, queries = Bench(table), [Query(text=text) for text in table.test.texts]
    trained = _figures_of(bench.measure("", _fitted(table, "graph_router", {}).estimate(queries, table.cards)))
    found: dict[str, list[dict[str, Floats]]] = {"left out": [], "card alone": [], "16 observations": []}
    for place, card in enumerate(table.cards):
        _say(f"cold start: {card.name}")
        router = _fitted(replace(table, train=table.train.without(card.name)), "graph_router", {})
        found["left out"].append(_figures_of(bench.measure("", _never(router, queries, table.cards, place))))
        for count, what in ((0, "card alone"), (16, "16 observations")):
            add_some(router, table.train, place, count, 0)
            found[what].append(_figures_of(bench.measure("", router.estimate(queries, table.cards))))
    means = {
        what: {key: np.mean([run[key] for run in runs], axis=0) for key in _FIGURES} for what, runs in found.items()
    }
    return {
        "trained with it": _intervals(trained),
        **{
            what: {
                **_intervals(figures),
                "balance_less_trained": interval(figures["balance"] - trained["balance"]),
                "balance_less_left_out": interval(figures["balance"] - means["left out"]["balance"]),
            }
            for what, figures in means.items()
        },
        "balance_by_expert": {
            card.name: {what: float(runs[place]["balance"][0]) for what, runs in found.items()}
            for place, card in enumerate(table.cards)
        },
    }


def _never(router: AnyRouter, queries: Sequence[Query], cards: Sequence[ExpertCard], place: int) -> Estimates:
    """Estimates in which the expert at `place` is never worth choosing, whatever the weights."""
    found = router.estimate(queries, cards)
    quality, cost = found.quality.copy(), found.cost_usd.copy()
    quality[:, place], cost[:, place] = -1e6, 1e6
    return replace(found, quality=quality, cost_usd=cost)


def _speed() -> Json:
    """Seconds to train on open9, and to score, embeddings and text being known: medians of many tries."""
    table = load_table(data_folder("open9"))
    shared_embedder().embed(table.train.texts)
    started = time.perf_counter()
    _fitted(table, "graph_router", {})
    train_s = time.perf_counter() - started
    table = load_table(data_folder("frontier15"))
    router = _fitted(table, "graph_router", {"steps": 20})
    queries = [Query(text=text) for text in table.test.texts[:256]]
    router.estimate(queries, table.cards)
    embeddings = shared_embedder().embed([query.text for query in queries])
    features = router._features([query.text for query in queries], embeddings)  # type: ignore[attr-defined]

    def score() -> object:
        return router._score(features, embeddings)  # type: ignore[attr-defined]

    singles = [_milliseconds(partial(router.estimate, [query], table.cards)) for query in queries * 4]
    return {
        "train_open9_s": train_s,
        "score_256_x_15_ms": _percentiles([_milliseconds(score) for _ in range(200)]),
        "estimate_256_x_15_ms": _percentiles(
            [_milliseconds(partial(router.estimate, queries, table.cards)) for _ in range(20)]
        ),
        "estimate_one_x_15_ms": _percentiles(singles),
    }


def _milliseconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def _percentiles(taken: Sequence[float]) -> Json:
    return {f"p{percent}": float(f"{np.percentile(taken, percent):.4g}") for percent in (50, 99)}


class _PlantedEmbedder(Embedder):
    """Stands for the language model, whose 100,000 sentences would take longer than what is measured."""

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """A topic's direction, by the text's first word, and noise by its number."""
        topics = np.random.default_rng(0).normal(size=(20, 384))
        found = np.empty((len(texts), 384), np.float32)
        for row, text in enumerate(texts):
            topic, _, number = text.partition(" ")
            noise = np.random.default_rng(zlib.crc32(number.encode()) % 9973).normal(size=384)
            found[row] = topics[int(topic) if topic.isdigit() else 0] + noise
        unit: FloatArray = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit


def _scale() -> Json:
    """A pool of 1,000 experts and 100,000 queries, 10 observed pairs a query: peak memory, seconds."""
    table = _large_table()
    before = _peak_gb()
    started = time.perf_counter()
    router = create_router("graph_router", {"steps": 60}, embedder=_PlantedEmbedder()).fit(table)
    fitted = time.perf_counter() - started
    queries = [Query(text=text) for text in table.texts[:256]]
    started = time.perf_counter()
    estimates = router.estimate(queries, table.cards)
    scored = time.perf_counter() - started
    error = np.nanmean((estimates.quality - table.quality[:256]) ** 2)
    mean = np.nanmean((np.nanmean(table.quality) - table.quality[:256]) ** 2)
    return {
        **_SCALE,
        "table_gb": before,
        "peak_gb": _peak_gb(),
        "train_s": fitted,
        "score_256_ms": 1000 * scored,
        "brier": float(error),
        "brier_of_the_mean": float(mean),
    }


def _large_table() -> Observations:
    """Experts good at some of 20 topics; what was not measured takes no memory."""
    rng = np.random.default_rng(0)
    experts, queries, each = _SCALE["experts"], _SCALE["queries"], _SCALE["each"]
    topic = rng.integers(0, 20, queries)
    right = rng.beta(2, 2, (20, experts)).astype(np.float32)
    rows = np.repeat(np.arange(queries), each)
    columns = rng.integers(0, experts, queries * each)
    quality, cost, tokens = (np.full((queries, experts), np.nan, np.float32) for _ in range(3))
    quality[rows, columns] = rng.random(len(rows)) < right[topic[rows], columns]
    tokens[rows, columns] = rng.integers(20, 400, len(rows))
    cost[rows, columns] = tokens[rows, columns] * 1e-6
    unknown = np.broadcast_to(np.float32(np.nan), quality.shape)
    return Observations(
        ids=[str(i) for i in range(queries)],
        texts=[f"{topic[i]} {i}" for i in range(queries)],
        tasks=[str(found) for found in topic],
        cards=[
            ExpertCard(name=f"expert-{e}", description=f"{e % 20} expert", output_price=1.0) for e in range(experts)
        ],
        quality=quality,
        cost_usd=cost,
        input_tokens=unknown,
        output_tokens=tokens,
        latency_s=unknown,
    )


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _say(step: str) -> None:
    sys.stderr.write(f"{step}\n")


_EXPERIMENTS: Mapping[str, Callable[[], Any]] = {
    **{table: partial(_compared, table) for table in TABLES},
    "cold-start": _cold_start,
    "ablation": _ablation,
    "one-hot": _one_hot,
    "speed": _speed,
    "scale": _scale,
}

if __name__ == "__main__":
    main()
