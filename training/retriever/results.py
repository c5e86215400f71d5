"""Make every figure of docs/retrieval.md again: `python -m training.retriever.results WORK`.

Trains the retriever, the adapter of all tasks and the retriever without one collection into the folder WORK (a killed
run goes on there), measures them on the judged test queries of the collections in ROUTER_DATA_DIR (by default
../shared/data), and writes docs/results/retrieval.json and the document's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray
from routers.embedder import shared_embedder
from routers.router_retriever import Aggregation
from training.doc_tables import fill_tables, markdown
from training.metrics import Floats, Interval
from training.retriever.bench import bench
from training.retriever.corpus import normalised, read_corpus, test_queries
from training.retriever.evaluate import FIGURES, Collections, Measured, Retriever, evaluate, measure_routed, query_draws
from training.retriever.multi_task import fit_multi_task
from training.retriever.pairs import pairs_of
from training.retriever.train import RetrieverManifest, RetrieverSpec, embed_all, train_retriever

COLLECTIONS = ("med", "cacm", "npl", "adi", "cran")
LEFT_OUT = "cran"
DOCUMENT, RESULTS = Path("docs/retrieval.md"), Path("docs/results/retrieval.json")

Json = dict[str, Any]

_COMPARED = (("mean", "base"), ("mean", "multi_task"), ("mean", "dataset_oracle"), ("mean", "classifier"))
_SYSTEMS = ("bm25", "base", "multi_task", *get_args(Aggregation), "classifier", "dataset_oracle", "query_oracle")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m training.retriever.results", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for what is trained")
    parser.add_argument("--bench", action="store_true", help="measure the times alone")
    chosen = parser.parse_args(arguments)
    found: Json = json.loads(RESULTS.read_bytes()) if RESULTS.is_file() else {}
    whole = RetrieverSpec(corpora=tuple(map(data_folder, COLLECTIONS)), out=chosen.work / "retriever")
    if not chosen.bench:
        found |= experiments(chosen.work, whole)
    found["times"] = bench(whole.out)
    found = {"command": "python -m training.retriever.results WORK", **found}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\{[^{}\[\]]*\}", lambda one: re.sub(r"\s+", " ", one[0]), json.dumps(found, indent=1))
    RESULTS.write_text(text + "\n", "utf-8")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8"), found), "utf-8")


def data_folder(collection: str) -> Path:
    """Where a collection lies."""
    return Path(os.environ.get("ROUTER_DATA_DIR") or "../shared/data").resolve() / "retrieval" / collection


def experiments(work: Path, whole: RetrieverSpec) -> Json:
    """Every figure but the times."""
    without = tuple(folder for folder in whole.corpora if folder.name != LEFT_OUT)
    before = whole.model_copy(update={"corpora": without, "out": work / "before"})
    train_retriever(before, on_progress=_say)
    train_retriever(whole.model_copy(update={"start": before.out}), on_progress=_say)
    removed = before.model_copy(update={"out": work / "removed", "start": whole.out})
    train_retriever(removed, on_progress=_say)
    manifest = RetrieverManifest.read(whole.out)
    multi_task = _multi_task(work / "multi-task", whole, sum(domain.steps for domain in manifest.domains.values()))
    embedder = shared_embedder(whole.encoder)
    collections = Collections.read(whole.corpora, lambda name, texts: embed_all(embedder, texts, name, _say))
    measured = evaluate(Retriever(whole.out, multi_task), collections, _say)
    return {
        "queries": {name: int((collections.of_query == i).sum()) for i, name in enumerate(collections.names)},
        "documents": {corpus.name: len(corpus.ids) for corpus in collections.corpora},
        "pairs_that_ask_a_judged_query": _judged_among_pairs(whole),
        "domains": {name: domain.model_dump() for name, domain in manifest.domains.items()},
        "systems": _systems(collections, measured),
        "differences": _differences(collections, measured),
        "routing": _routing(collections, measured),
        "left_out": _left_out(collections, measured, before.out, removed.out),
    }


def _judged_among_pairs(spec: RetrieverSpec) -> int:
    """How many pairs, of whichever collection, ask what a judged test query of any asks, word for word."""
    judged = {normalised(text) for folder in spec.corpora for text in test_queries(folder).values()}
    pairs = [pairs_of(read_corpus(folder), seed=spec.seed, most=spec.most_pairs) for folder in spec.corpora]
    return sum(normalised(pair.query) in judged for part in pairs for pair in (*part.train, *part.held_out))


def _multi_task(folder: Path, spec: RetrieverSpec, steps: int) -> Path:
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    embedder = shared_embedder(spec.encoder)
    fit_multi_task(
        [read_corpus(corpus) for corpus in spec.corpora],
        folder / "adapter",
        embed=lambda texts: embed_all(embedder, texts, "embed", _say),
        encoder=spec.encoder,
        config=spec.adapter,
        steps=steps,
        most_pairs=spec.most_pairs,
        seed=spec.seed,
        checkpoint=Checkpoint(folder / "state", on_progress=lambda done, total: _say("train multi-task", done, total)),
    )
    return folder / "adapter"


def _systems(collections: Collections, measured: Measured) -> Json:
    """index -> figure -> system -> over which queries -> interval."""
    weights = query_draws(collections)
    return {
        index: {
            figure: {
                system: {
                    over: _interval(measured.mean(system, index, figure, draws)) for over, draws in weights.items()
                }
                for system in _SYSTEMS
            }
            for figure in FIGURES
        }
        for index in ("alone", "mixed")
    }


def _differences(collections: Collections, measured: Measured) -> Json:
    """Paired: the same queries under the same draws."""
    weights = query_draws(collections)
    return {
        index: {
            figure: {
                f"{one} - {other}": {
                    over: _difference((measured, one), (measured, other), index, figure, weights[over])
                    for over in ("queries", "collections")
                }
                for one, other in _COMPARED
            }
            for figure in FIGURES
        }
        for index in ("alone", "mixed")
    }


def _routing(collections: Collections, measured: Measured) -> Json:
    """The share of each collection's queries that goes to its own expert."""
    own = measured.routed["dataset_oracle"]
    return {
        way: {
            name: float(np.mean([experts[i] == own[i] for i in np.flatnonzero(collections.of_query == place).tolist()]))
            for place, name in enumerate(collections.names)
        }
        for way, experts in measured.routed.items()
    }


def _left_out(collections: Collections, added: Measured, before: Path, removed: Path) -> Json:
    """What adding one collection did to its own queries and to the others', and whether removing it undid all of it."""
    place = collections.names.index(LEFT_OUT)
    own = (collections.of_query == place).astype(np.float32)
    draws = query_draws(collections)["queries"]
    without = measure_routed(Retriever(before), collections, "mean")
    again = measure_routed(Retriever(removed), collections, "mean")
    gains: Json = {}
    for name, weights in (("own", own), ("others", 1 - own)):
        gains[name] = {
            f"{index} {figure}": _difference((added, "mean"), (without, "mean"), index, figure, draws * weights)
            for index in ("alone", "mixed")
            for figure in FIGURES
        }
    return {
        "collection": LEFT_OUT,
        "gain": gains,
        "removed": {
            "files_equal": _same_files(before, removed),
            "figures_equal": all(
                np.array_equal(without.systems["mean"][index][figure], again.systems["mean"][index][figure])
                for index in ("alone", "mixed")
                for figure in FIGURES
            ),
            "routes_equal": without.routed["mean"] == again.routed["mean"],
        },
    }


def _same_files(one: Path, other: Path) -> bool:
    """Whether two retrievers are the same but for their manifests' times."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != "retriever.json"}
    others = {path.relative_to(other) for path in other.rglob("*") if path.is_file() and path.name != "retriever.json"}
    return names == others and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def _difference(
    one: tuple[Measured, str], other: tuple[Measured, str], index: str, figure: str, draws: FloatArray
) -> Json:
    """Of two systems' means, query by query."""
    (first, system), (second, reference) = one, other
    return _interval(first.mean(system, index, figure, draws) - second.mean(reference, index, figure, draws))


def _interval(figures: Floats) -> Json:
    found = Interval.of(figures)
    if found is None:
        return {}
    return {"value": round(found.value, 5), "low": round(found.low, 5), "high": round(found.high, 5)}


def _say(step: str, done: int, total: int) -> None:
    now = time.monotonic()
    if done == total or now - _said.get(step, 0.0) > 10.0:
        _said[step] = now
        sys.stderr.write(f"{step} {done}/{total}\n")


_said: dict[str, float] = {}


# The document's tables


def with_tables(document: str, results: Json) -> str:
    """`document` with the tables between `<!-- NAME -->` and `<!-- end -->` made from `results`."""
    tables: dict[str, tuple[str, Callable[[Any], str]]] = {
        "alone": ("systems", lambda systems: _systems_table(systems["alone"])),
        "mixed": ("systems", lambda systems: _systems_table(systems["mixed"])),
        "differences": ("differences", _differences_table),
        "routing": ("routing", _routing_table),
        "domains": ("domains", _domains_table),
        "left-out": ("left_out", _left_out_table),
        "times": ("times", _times_table),
    }

    def table_of(name: str) -> str | None:
        part, table = tables[name]
        return table(results[part]) if part in results else None

    return fill_tables(document, table_of)


def _systems_table(figures: Json) -> str:
    rows = []
    for system in _SYSTEMS:
        found = figures["ndcg@10"][system]
        per = [f"{found[name]['value']:.3f}" for name in COLLECTIONS]
        means = [_cell(found["queries"]), _cell(found["collections"])]
        rows.append([system, *per, *means, _cell(figures["recall@100"][system]["queries"])])
    return markdown(["", *COLLECTIONS, "nDCG@10, queries", "nDCG@10, collections", "R@100, queries"], rows)


def _differences_table(differences: Json) -> str:
    rows = [
        [index, name, pair, *(_cell(found[over], sign="+") for over in ("queries", "collections"))]
        for index, figures in differences.items()
        for figure, name in (("ndcg@10", "nDCG@10"), ("recall@100", "R@100"))
        for pair, found in figures[figure].items()
    ]
    return markdown(["index", "figure", "difference", "over queries", "over collections"], rows)


def _routing_table(routing: Json) -> str:
    ways = [way for way in routing if way != "dataset_oracle"]
    return markdown(["", *COLLECTIONS], [[way, *(f"{routing[way][name]:.0%}" for name in COLLECTIONS)] for way in ways])


def _domains_table(domains: Json) -> str:
    rows = [
        [
            name,
            str(domain["documents"]),
            str(domain["train_pairs"]),
            str(domain["steps"]),
            f"{domain['scale']:g}",
            f"{domain['held_out_ndcg']['0']:.3f}",
            f"{domain['held_out_ndcg'][format(domain['scale'], 'g')]:.3f}",
        ]
        for name, domain in domains.items()
    ]
    head = ["domain", "documents", "pairs", "steps", "scale kept", "held-out nDCG@10 of the base", "of the adapter"]
    return markdown(head, rows)


def _left_out_table(left_out: Json) -> str:
    gain = left_out["gain"]
    rows = [
        [figure, _cell(gain["own"][figure], sign="+"), _cell(gain["others"][figure], sign="+")]
        for figure in gain["own"]
    ]
    return markdown(["", f"{left_out['collection']}'s own queries", "all others'"], rows)


def _times_table(times: Json) -> str:
    return markdown(["", ""], [[name.replace("_", " "), f"{value:.3f}"] for name, value in times.items()])


def _cell(found: Json, sign: str = "") -> str:
    value, low, high = (format(found[part], f"{sign}.3f") for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
