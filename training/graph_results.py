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
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from experts.cards import ExpertCard
from routers.checkpoint import Checkpoint
from routers.contracts import Estimates, FloatArray, Observations, Query
from routers.embedder import Embedder, shared_embedder
from routers.graph_router import GraphRouter
from routers.registry import AnyRouter, create_router, router_class
from training.doc_tables import fill_tables, markdown
from training.evaluation import Bench, Evaluation
from training.graph_ablation import VARIANTS
from training.left_out import add_some
from training.metrics import REWARD_SETTINGS, CostScale, Floats, bootstrap, calibration, weighted_mean
from training.observations import Table, load_table
from training.report import Json, interval
from training.results import BASELINES, RESULTS, data_folder, write

TABLES = ("frontier15", "open9", "pair-mmlu")
SEEDS = range(5)
SETTINGS = Path("deploy/routers")
DOCUMENT = Path("docs/graph_router.md")

RouterT = TypeVar("RouterT", bound=AnyRouter)

_PLAIN_KNN: Mapping[str, Any] = {"k": 100, "temperature": 0.2, "text_weight": 0}
"""kNN on embeddings alone, as the field knows it."""

_FIGURES = ("aiq", "quality", "performance_first", "balance", "cost_first")
_SCALE = {"experts": 1000, "queries": 100_000, "held_out": 2000, "each": 10}
_FEW_SEEDS = range(3)
_DRAWS = range(5)
_CAUTIONS = (0.0, 0.5, 1.0)


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
        path = RESULTS / f"{name.removesuffix('-cautions')}.json"
        if not path.is_file():
            return None
        return _WRITTEN.get(name, _comparison)(json.loads(path.read_bytes())["results"])

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


def _fitted(table: Observations, kind: type[RouterT], options: Mapping[str, Any]) -> RouterT:
    """A router of `kind` fitted on `table`."""
    _say(f"fit {kind.__name__} {dict(options)} on {len(table)} queries x {len(table.cards)} experts")
    return kind(kind.config_type.model_validate(options)).fit(table)


def _measured(
    bench: Bench, table: Table, kind: type[AnyRouter], seeds: Sequence[int], options: Mapping[str, Any]
) -> dict[str, Floats]:
    """Its figures, the mean over the seeds."""
    fitted = (_fitted(table.train, kind, {**options, "seed": seed}) for seed in seeds)
    runs = [_figures_of(bench.measure("", _asked(router, table))) for router in fitted]
    return {name: np.mean([run[name] for run in runs], axis=0) for name in _FIGURES}


def _asked(router: AnyRouter, table: Table) -> Estimates:
    return router.estimate(_queries(table.test), table.test.cards)


def _figures_of(measured: Evaluation) -> dict[str, Floats]:
    found = {**measured.figures, **measured.rewards}
    return {name: found[name] for name in _FIGURES}


def _compared(name: str) -> Json:
    """Each router on a table, and GraphRouter less each baseline, paired."""
    table = load_table(data_folder(name))
    bench = Bench(table)
    kinds = {router: router_class(router) for router in (*BASELINES, "graph_router")}
    found = {router: _measured(bench, table, kind, SEEDS, {}) for router, kind in kinds.items()}
    found["knn of 100"] = _measured(bench, table, kinds["knn"], SEEDS[:1], _PLAIN_KNN)
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
    """GraphRouter with one part changed, less as it is, paired, on the two tables of many experts."""
    found: Json = {}
    for name in ("frontier15", "open9"):
        table = load_table(data_folder(name))
        bench = Bench(table)
        runs = {what: _variant(what, bench, table, _FEW_SEEDS) for what in VARIANTS}
        whole = runs["as it is"]
        found[name] = {
            what: {
                "seeds": len(_FEW_SEEDS),
                **_intervals({key: run[key] for key in _ABLATED}),
                "less_as_it_is": _intervals({key: run[key] - whole[key] for key in _ABLATED}),
            }
            for what, run in runs.items()
        }
    return found


_ABLATED = ("aiq", "performance_first", "balance", "cost_first", "squared_error", "ece", "cost_error")


def _variant(what: str, bench: Bench, table: Table, seeds: Sequence[int]) -> dict[str, Floats]:
    kind, options = VARIANTS[what]
    runs = []
    for seed in seeds:
        estimates = _asked(_fitted(table.train, kind, {**options, "seed": seed}), table)
        runs.append({**_figures_of(bench.measure("", estimates)), **_errors(estimates, table.test)})
    return {key: np.mean([run[key] for run in runs], axis=0) for key in _ABLATED}


def _errors(estimates: Estimates, test: Observations) -> dict[str, Floats]:
    """Of quality its squared error and calibration, and of the logarithm of cost its absolute error."""
    draws = bootstrap(len(test), resamples=1000)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.abs(np.log(estimates.cost_usd) - np.log(np.where(test.cost_usd > 0, test.cost_usd, np.nan)))
    return {
        "squared_error": weighted_mean(np.nanmean((estimates.quality - test.quality) ** 2, axis=1), draws),
        "ece": calibration(estimates.quality, test.quality, draws).error,
        "cost_error": weighted_mean(np.nanmean(cost, axis=1), draws),
    }


def _ablation_table(results: Json) -> str:
    rows = []
    for table, variants in results.items():
        for what, found in variants.items():
            less = found["less_as_it_is"]
            base = what == "as it is"
            rows.append([
                table,
                what,
                f"{found['aiq']['value']:.4f}",
                *("-" if base else _signed(less[key]) for key in ("aiq", "balance", "squared_error")),
                f"{found['ece']['value']:.3f}",
                f"{found['cost_error']['value']:.3f}",
            ])  # fmt: skip
    head = ["table", "variant", "AIQ", "AIQ less as it is", "Balance less", "squared error less", "ECE", "cost error"]
    return markdown(head, rows)


def _signed(found: Json) -> str:
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _one_hot() -> Json:
    """The paper's loss, one router for each setting, beside one router for all of them."""
    found: Json = {}
    for name in ("open9",):
        table = load_table(data_folder(name))
        bench = Bench(table)
        whole = _measured(bench, table, GraphRouter, _FEW_SEEDS, {})
        found[name] = {setting: _at_setting(bench, table, setting, whole) for setting in REWARD_SETTINGS}
    return found


def _at_setting(bench: Bench, table: Table, setting: str, whole: Mapping[str, Floats]) -> Json:
    options = yaml.safe_load((SETTINGS / f"graph-{setting.replace('_', '-')}.yaml").read_text("utf-8"))
    runs = []
    for seed in _FEW_SEEDS:
        estimates = _asked(_fitted(table.train, GraphRouter, {**options, "seed": seed}), table)
        # Its score has the cost in it already, so it chooses by that alone.
        alone = replace(estimates, cost_usd=np.zeros_like(estimates.cost_usd))
        runs.append(bench.measure("graph_router", alone).rewards[setting])
    one_hot = np.mean(runs, axis=0)
    both = {"one_hot": one_hot, "one_for_all": whole[setting]}
    return _intervals({**both, "one_for_all_less_one_hot": whole[setting] - one_hot})


def _one_hot_table(results: Json) -> str:
    rows = [
        [
            table,
            setting.replace("_", " "),
            *(_plain(found[key]) for key in ("one_hot", "one_for_all")),
            _signed(found["one_for_all_less_one_hot"]),
        ]
        for table, settings in results.items()
        for setting, found in settings.items()
    ]
    return markdown(["table", "setting", "one-hot", "one for all", "one for all less one-hot"], rows)


def _plain(found: Json) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _queries(table: Observations) -> list[Query]:
    return [Query(text=text) for text in table.texts]


def _cold_start() -> Json:
    """Each expert of open9 left out in turn: never added, added by its card, added with 16 observations drawn anew."""
    table = load_table(data_folder("open9"))
    bench, queries = Bench(table), _queries(table.test)
    trained = bench.measure("", _asked(_fitted(table.train, GraphRouter, {}), table)).rewards["balance"]
    experts: Json = {}
    means: dict[str, list[Floats]] = {}
    for place, card in enumerate(table.cards):
        router = _fitted(table.train.without(card.name), GraphRouter, {})
        found = {"left out": bench.measure("", _never(router, queries, table.cards, place)).rewards["balance"]}
        chosen = {}
        for caution in _CAUTIONS:
            router.config = router.config.model_copy(update={"caution": caution})
            add_some(router, table.train, place, 0, 0)
            what = f"card alone, caution {caution:g}"
            found[what], chosen[what] = _added(bench, router, queries, table, place)
        draws = []
        for draw in _DRAWS:
            add_some(router, table.train, place, 16, draw)
            draws.append(_added(bench, router, queries, table, place))
        found["16 observations"] = np.mean([reward for reward, _ in draws], axis=0)
        chosen["16 observations"] = float(np.mean([share for _, share in draws]))
        experts[card.name] = _beside_trained(found, trained) | {
            "chosen": chosen,
            "less_trained_by_draw": [float(reward[0] - trained[0]) for reward, _ in draws],
        }
        for what, reward in found.items():
            means.setdefault(what, []).append(reward)
    overall = _beside_trained({what: np.mean(rewards, axis=0) for what, rewards in means.items()}, trained)
    return {"trained": interval(trained), "experts": experts, "mean": overall}


def _added(bench: Bench, router: AnyRouter, queries: Sequence[Query], table: Table, place: int) -> tuple[Floats, float]:
    """The Balance reward, and the share of queries for which it chooses the expert at `place`."""
    estimates = router.estimate(queries, table.cards)
    alpha, beta = REWARD_SETTINGS["balance"]
    expected = alpha * estimates.quality - beta * CostScale.over(table.train.cost_usd)(estimates.cost_usd)
    return bench.measure("", estimates).rewards["balance"], float((expected.argmax(1) == place).mean())


def _beside_trained(found: Mapping[str, Floats], trained: Floats) -> Json:
    """Balance of each way, less that of the router trained with the expert, and less that without it, paired."""
    return {
        what: {
            "balance": interval(reward),
            "less_trained": interval(reward - trained),
            "less_left_out": interval(reward - found["left out"]),
        }
        for what, reward in found.items()
    }


def _cold_start_table(results: Json) -> str:
    alone = f"card alone, caution {_CAUTIONS[-1]:g}"
    rows = [
        [
            name,
            _signed(found["16 observations"]["less_trained"]),
            f"{min(found['less_trained_by_draw']):+.4f}" if "chosen" in found else "-",
            _signed(found[alone]["less_left_out"]),
            *(f"{found['chosen'][what]:.0%}" if "chosen" in found else "-" for what in ("16 observations", alone)),
        ]
        for name, found in (*results["experts"].items(), ("mean", results["mean"]))
    ]
    head = ["expert", "16 less trained", "worst draw", "card alone less left out", "chosen with 16", "chosen by card"]
    return markdown(head, rows)


def _cautions_table(results: Json) -> str:
    rows = []
    for caution in _CAUTIONS:
        what = f"card alone, caution {caution:g}"
        worst = min(results["experts"].values(), key=lambda found: found[what]["less_left_out"]["value"])
        chosen = np.mean([found["chosen"][what] for found in results["experts"].values()])
        mean = results["mean"][what]["less_left_out"]
        rows.append([f"{caution:g}", _signed(mean), _signed(worst[what]["less_left_out"]), f"{chosen:.0%}"])
    return markdown(["caution", "mean over experts", "the worst expert", "chosen"], rows)


def _never(router: AnyRouter, queries: Sequence[Query], cards: Sequence[ExpertCard], place: int) -> Estimates:
    """Estimates in which the expert at `place` is never worth choosing, whatever the weights."""
    found = router.estimate(queries, cards)
    quality, cost = found.quality.copy(), found.cost_usd.copy()
    quality[:, place], cost[:, place] = -1e6, 1e6
    return replace(found, quality=quality, cost_usd=cost)


_DESCRIPTIONS = {
    "agentverse-logicgrid": "Logic puzzles about houses in a row and who lives in which of them.",
    "agentverse-mgsm": "Grade school mathematics word problems, to be solved step by step.",
    "arc_challenge": "Grade school science exam questions with several choices.",
    "commongen": "A list of words; write a text that uses all of them.",
    "commonsense_qa": "Multiple choice questions of common sense about everyday things.",
    "gpqa": "Graduate level questions of biology, physics and chemistry with several choices.",
    "gsm8k": "Grade school mathematics word problems with a number as the answer.",
    "human_eval": "Complete a Python function of which the signature and the docstring are given.",
    "math": "Competition mathematics: algebra, geometry, number theory, probability.",
    "mbpp": "Write a Python function that does what one sentence says, with tests.",
    "mmlu": "Exam questions of many subjects, of history, law, medicine and science, with several choices.",
    "natural_qa": "Short factual questions as people type them into a search engine.",
    "openbook_qa": "Elementary science facts: complete the sentence by one of several choices.",
    "trivia_qa": "Trivia quiz questions about people, places, films, music and sports.",
}


def _unknown_task() -> Json:
    """Each task of open9 left out in turn, then added by a description or by 16 of its queries."""
    table = load_table(data_folder("open9"))
    tasks = np.array(table.train.tasks)
    found: Json = {}
    for task in sorted(_DESCRIPTIONS):
        rest = table.train.rows(np.flatnonzero(tasks != task))
        few = np.random.default_rng(0).permutation(np.flatnonzero(tasks == task))[:16]
        ways: Json = {"no node": None, "description": {"description": _DESCRIPTIONS[task]}}
        ways["16 queries"] = {"examples": [table.train.texts[row] for row in few]}
        router = _fitted(rest, GraphRouter, {})
        found[task] = {what: _as_unknown(copy(router), table, task, given) for what, given in ways.items()}
    shares = ("read_as_it", "others_read_as_it", "known", "quality_of_choice")
    mean = {
        what: {key: float(np.mean([of_task[what][key] for of_task in found.values()])) for key in shares}
        for what in ("no node", "description", "16 queries")
    }
    return {"tasks": found, "mean": mean}


def _as_unknown(router: GraphRouter, table: Table, task: str, given: Mapping[str, Any] | None) -> Json:
    """Shares of the task's test queries that are read as it and taken for known, and of the others read as it."""
    node = router.add_task(task, **given) if given else None
    guesses = router.tasks(table.test.texts)
    own = np.array(table.test.tasks) == task
    read, known = (np.array(values) for values in ([g.task == task for g in guesses], [g.known for g in guesses]))
    queries = _queries(table.test.rows(np.flatnonzero(own)))
    estimates = router.estimate(queries, table.test.cards)
    quality = table.test.quality[own]
    return {
        "read_as_it": float(read[own].mean()),
        "others_read_as_it": float(read[~own].mean()),
        "known": float(known[own].mean()),
        "quality_of_choice": float(quality[np.arange(len(quality)), estimates.quality.argmax(1)].mean()),
        "nearest": node.nearest if node else {},
    }


def _unknown_task_table(results: Json) -> str:
    rows = [
        [what, *(f"{found[key]:.3f}" for key in ("read_as_it", "others_read_as_it", "known", "quality_of_choice"))]
        for what, found in results["mean"].items()
    ]
    return markdown(["the task has", "its queries read as it", "others read as it", "known", "quality chosen"], rows)


class _KnownEmbedder(Embedder):
    """Has embedded every text already: what is left is the router's own time."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self._known = shared_embedder().embed(texts)
        self._place = {text: place for place, text in enumerate(texts)}

    def embed(self, texts: Sequence[str]) -> FloatArray:
        return self._known.take([self._place[text] for text in texts], axis=0)


def _speed() -> Json:
    """Milliseconds to estimate, from texts whose embeddings are known: all of it, text features too."""
    table = load_table(data_folder("frontier15"))
    texts = table.test.texts[:256]
    descriptions = [card.description or card.name for card in table.cards]
    router = _fitted(table.train, GraphRouter, {"steps": 20})
    router._embedder = _KnownEmbedder([*texts, *descriptions])
    queries = [Query(text=text) for text in texts]
    router.estimate(queries, table.cards)
    return {
        "estimate_256_x_15_ms": _percentiles(
            [_milliseconds(partial(router.estimate, queries, table.cards)) for _ in range(200)]
        ),
        "estimate_one_x_15_ms": _percentiles(
            [_milliseconds(partial(router.estimate, [query], table.cards)) for query in queries * 8]
        ),
    }


def _training_time() -> Json:
    """Seconds to train on open9, its texts being embedded."""
    table = load_table(data_folder("open9"))
    shared_embedder().embed(table.train.texts)
    started, used = time.perf_counter(), time.process_time()
    _fitted(table.train, GraphRouter, {})
    return {"train_open9_s": time.perf_counter() - started, "train_open9_cpu_s": time.process_time() - used}


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
    """A pool of 1,000 experts and 100,000 queries, 10 observed pairs a query, all steps: peak memory, seconds.

    Scored on queries that it was not trained on.
    """
    right = np.random.default_rng(0).beta(2, 2, (20, _SCALE["experts"])).astype(np.float32)
    train, held_out = (_large_table(right, _SCALE[part], seed) for part, seed in (("queries", 1), ("held_out", 2)))
    before, steps = _peak_gb(), []
    router = create_router("graph_router", {}, embedder=_PlantedEmbedder())
    router.checkpoint = Checkpoint(on_progress=lambda done, total: steps.append(done))
    started = time.perf_counter()
    router.fit(train)
    fitted = time.perf_counter() - started
    taken = [_milliseconds(partial(router.estimate, _queries(held_out)[:256], held_out.cards)) for _ in range(9)]
    errors: dict[str, Floats] = {}
    draws = bootstrap(len(held_out), resamples=200)
    estimates = router.estimate(_queries(held_out), held_out.cards).quality
    topic = np.array([int(task) for task in held_out.tasks])
    for what, expected in {
        "brier": estimates,
        "brier_of_the_mean": np.full_like(estimates, np.nanmean(train.quality)),
        "brier_of_each_experts_mean": np.broadcast_to(np.nanmean(train.quality, axis=0), estimates.shape),
        "brier_of_the_truth": right[topic],
    }.items():
        errors[what] = weighted_mean(np.nanmean((expected - held_out.quality) ** 2, axis=1), draws)
    return {
        **_SCALE,
        "steps": steps[-1],
        "table_gb": before,
        "peak_gb": _peak_gb(),
        "train_s": fitted,
        "score_256_ms": _percentiles(taken),
        **{what: interval(error) for what, error in errors.items()},
    }


def _large_table(right: FloatArray, queries: int, seed: int) -> Observations:
    """Experts that are `right` [20, E] so often on each of 20 topics; what was not measured takes no memory."""
    rng = np.random.default_rng(seed)
    experts, each = right.shape[1], _SCALE["each"]
    topic = rng.integers(0, 20, queries)
    rows = np.repeat(np.arange(queries), each)
    columns = rng.integers(0, experts, queries * each)
    quality, cost, tokens = (np.full((queries, experts), np.nan, np.float32) for _ in range(3))
    quality[rows, columns] = rng.random(len(rows)) < right[topic[rows], columns]
    tokens[rows, columns] = rng.integers(20, 400, len(rows))
    cost[rows, columns] = tokens[rows, columns] * 1e-6
    unknown = np.broadcast_to(np.float32(np.nan), quality.shape)
    return Observations(
        ids=[str(i) for i in range(queries)],
        texts=[f"{topic[i]} {seed}{i}" for i in range(queries)],
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
    "unknown-task": _unknown_task,
    "speed": _speed,
    "training-time": _training_time,
    "scale": _scale,
}

_WRITTEN: Mapping[str, Callable[[Json], str]] = {
    "graph-ablation": _ablation_table,
    "graph-one-hot": _one_hot_table,
    "graph-cold-start": _cold_start_table,
    "graph-cold-start-cautions": _cautions_table,
    "graph-unknown-task": _unknown_task_table,
}

if __name__ == "__main__":
    main()
