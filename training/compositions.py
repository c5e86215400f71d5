"""What `composition` is worth: its categories against a linear classifier, its table against `cluster` and a budget."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from routers.categories import GENERAL, Categories
from routers.composition import CompositionConfig
from routers.contracts import FloatArray
from routers.embedder import EmbedderConfig, shared_embedder
from routers.errors import ObservationError
from routers.registry import create_router
from training import metrics
from training.evaluation import Bench, column_means
from training.metrics import Floats
from training.observations import Table
from training.report import Json, interval

_RESAMPLES = 1000
_HALF = 0.5


def against_cluster(table: Table, *, seed: int = 0) -> Json:
    """`composition` beside `cluster`, their paired differences, and a table for half the best single expert's cost."""
    bench = Bench(table, resamples=_RESAMPLES)
    found = {
        name: bench.measure_router(create_router(name, {"seed": seed}).fit(table.train)).figures
        for name in ("cluster", "composition")
    }
    shown = ("quality", "aiq", "cost_usd_per_1k", "saved")
    difference = {key: found["composition"][key] - found["cluster"][key] for key in ("quality", "aiq")}
    return {
        "queries": len(table.test),
        "routers": {name: {key: interval(figures[key]) for key in shown} for name, figures in found.items()},
        "difference": {key: interval(values) for key, values in difference.items()},
        "half_cost": _half_cost(table, bench, seed),
    }


def _half_cost(table: Table, bench: Bench, seed: int) -> Json:
    """A table within half of the best single expert's mean train cost, on test."""
    best = int(column_means(table.train.quality).argmax())
    budget = _HALF * float(np.nanmean(table.train.cost_usd[:, best]))
    router = create_router("composition", {"seed": seed, "budget": {"mean_cost_usd": budget}}).fit(table.train)
    figures = bench.measure_router(router).figures
    return {
        "best_single": table.test.cards[best].name,
        "budget_usd_per_1k": 1000 * budget,
        "cost_usd_per_1k": interval(figures["cost_usd_per_1k"]),
        "of_budget": float(figures["cost_usd_per_1k"][0] / (1000 * budget)),
        "quality": interval(figures["quality"]),
        "gain": interval(figures["gain"]),
    }


@dataclass(frozen=True, slots=True)
class Intents:
    """Labelled queries; those out of scope are labelled "general"."""

    train: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]


def read_intents(folder: Path) -> Intents:
    """The folder `intents`: 150 intents by their ten domains, and out-of-scope queries in the test part alone.

    Raises `ObservationError`.
    """
    try:
        found = json.loads(gzip.decompress((folder / "clinc150.json.gz").read_bytes()))
        domains = json.loads((folder / "domains.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ObservationError(f"{folder}: cannot be read: {error}") from error
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    outside = [(text, GENERAL) for part in ("oos_train", "oos_val") for text, _ in found[part]]
    return Intents(
        train=[(text, domain_of[intent]) for text, intent in found["train"]],
        test=[(text, domain_of[intent]) for text, intent in found["val"]] + outside,
    )


def against_linear(intents: Intents, *, seed: int = 0) -> Json:
    """Categories against a linear classifier on the same embeddings, which is unsure where its probability is low.

    Both may send 5% of the train queries to "general", by scores for queries that they had not seen.
    """
    embedder = shared_embedder(EmbedderConfig())
    texts, labels = zip(*intents.train, strict=True)
    asked, truth = zip(*intents.test, strict=True)
    train, test = embedder.embed(texts), embedder.embed(asked)
    config = CompositionConfig(seed=seed)
    ours, _ = Categories.fit(
        texts, train, labels, prototypes=config.prototypes, unknown_share=config.unknown_share,
        least_probability=config.least_probability, seed=seed,
    )  # fmt: skip
    unbounded = replace(ours, least_cosine=-1.0, least_probability=0.0)
    names = (*ours.names, GENERAL)
    found = {
        "composition": _outcomes(unbounded(asked, test), ours(asked, test), names, truth),
        "linear": _outcomes(*_linear(train, labels, test, names, config.unknown_share, seed), names, truth),
    }
    draws = metrics.bootstrap(len(asked), resamples=_RESAMPLES, seed=0)
    scores = {name: {key: metrics.weighted_mean(v, draws) for key, v in rows.items()} for name, rows in found.items()}
    return {
        "train": len(texts),
        "in_scope": sum(label != GENERAL for label in truth),
        "out_of_scope": sum(label == GENERAL for label in truth),
        "classifiers": {name: {key: interval(v) for key, v in rows.items()} for name, rows in scores.items()},
        "difference": {key: interval(scores["composition"][key] - v) for key, v in scores["linear"].items()},
    }


def _linear(
    train: FloatArray, labels: Sequence[str], test: FloatArray, names: Sequence[str], unknown_share: float, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Probabilities of the test queries [B, C + 1], and the same with "general" for those that it is unsure of."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    places = np.array([names.index(label) for label in labels])
    model = LogisticRegression(C=10.0, max_iter=300)
    folds = StratifiedKFold(4, shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, train, places, cv=folds, method="predict_proba")
    edge = np.quantile(held_out.max(1), unknown_share)
    found = np.hstack([model.fit(train, places).predict_proba(test), np.zeros((len(test), 1))]).astype(np.float32)
    decided = found.copy()
    decided[found.max(1) < edge] = np.eye(len(names), dtype=np.float32)[-1]
    return found, decided


def _outcomes(
    likely: FloatArray, decided: FloatArray, names: Sequence[str], truth: Sequence[str]
) -> Mapping[str, Floats]:
    """Per query, NaN where it does not count.

    `accuracy` is of the likeliest category, `decided_accuracy` counts what was sent to "general" as wrong.
    """
    wanted = np.array([names.index(label) for label in truth])
    outside, last = wanted == len(names) - 1, len(names) - 1
    return {
        "accuracy": np.where(outside, np.nan, likely.argmax(1) == wanted),
        "out_of_scope_recall": np.where(outside, decided.argmax(1) == last, np.nan),
        "in_scope_kept": np.where(outside, np.nan, decided.argmax(1) != last),
        "decided_accuracy": np.where(outside, np.nan, decided.argmax(1) == wanted),
        "confidence_less_accuracy": np.where(outside, np.nan, likely.max(1) - (likely.argmax(1) == wanted)),
    }
