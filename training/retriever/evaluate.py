"""What routing between embedding experts is worth, on the judged test queries of several collections.

Every system is measured on each collection alone and on one index of all of them. Figures are per query, so that two
systems can be compared query by query; intervals come from the bootstrap weights of `training.metrics`.

    bm25              words
    base              the frozen encoder
    multi_task        one adapter trained on all domains
    mean, max, softmax  RouterRetriever by its aggregation of pilots
    classifier        the adapter of the domain that a logistic regression on base embeddings names
    dataset_oracle    the adapter of the query's own collection
    query_oracle      the expert, an adapter or the base, that served the query best (nDCG@10): above any router
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import Encoder, EncoderFiles
from routers.contracts import FloatArray, Query
from routers.embedder import shared_embedder
from routers.registry import create_router
from routers.router_retriever import Aggregation
from training.metrics import Floats, bootstrap, weighted_mean
from training.observations import load_table
from training.retriever.corpus import Corpus, Judged, held_out_judgments, read_corpus, read_queries
from training.retriever.measures import BM25, ndcg, recall, top
from training.retriever.train import OnProgress, RetrieverManifest, expert_name

FIGURES: Mapping[str, Callable[[Sequence[str], Mapping[str, int]], float]] = {"ndcg@10": ndcg, "recall@100": recall}
_DEPTH = 100
_MULTI_TASK = "multi_task"


@dataclass(frozen=True, slots=True)
class Collections:
    """The documents of several collections, and Q judged test queries; `of_query` [Q] is each one's collection."""

    corpora: Sequence[Corpus]
    documents: FloatArray
    of_document: np.ndarray
    ids: np.ndarray
    queries: Sequence[str]
    of_query: np.ndarray
    judged: Sequence[Mapping[str, int]]

    @classmethod
    def read(cls, folders: Sequence[Path], embed: Callable[[str, Sequence[str]], FloatArray]) -> Collections:
        """Read collections and embed their documents with the frozen encoder. Ids get their collection before them."""
        corpora = [read_corpus(folder) for folder in folders]
        judged: list[Judged] = [held_out_judgments(folder) for folder in folders]
        texts = [read_queries(folder, grades) for folder, grades in zip(folders, judged, strict=True)]
        return cls(
            corpora=corpora,
            documents=np.concatenate([embed(corpus.name, corpus.texts) for corpus in corpora]),
            of_document=np.repeat(np.arange(len(corpora)), [len(corpus.ids) for corpus in corpora]),
            ids=np.array([f"{corpus.name}/{document}" for corpus in corpora for document in corpus.ids]),
            queries=[text for queries in texts for text in queries.values()],
            of_query=np.repeat(np.arange(len(corpora)), [len(queries) for queries in texts]),
            judged=[
                {f"{corpus.name}/{document}": grade for document, grade in grades.items()}
                for corpus, queries in zip(corpora, judged, strict=True)
                for grades in queries.values()
            ],
        )

    @property
    def names(self) -> list[str]:
        """The collections' names."""
        return [corpus.name for corpus in self.corpora]

    def measure(self, scores: FloatArray, *, mixed: bool) -> dict[str, Floats]:
        """Each figure of each query [Q] for `scores` [Q, documents], among all documents or its collection's alone."""
        if not mixed:
            scores = np.where(self.of_document[None] == self.of_query[:, None], scores, -np.inf)
        rankings = [self.ids[places].tolist() for places in top(scores, _DEPTH)]
        return {
            name: np.array([figure(ranking, grades) for ranking, grades in zip(rankings, self.judged, strict=True)])
            for name, figure in FIGURES.items()
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures [Q] of every system by index ("alone" or "mixed") and figure; `routed` [Q] is whom routers chose."""

    systems: Mapping[str, Mapping[str, Mapping[str, Floats]]]
    routed: Mapping[str, Sequence[str]]

    def mean(self, system: str, index: str, figure: str, draws: FloatArray) -> Floats:
        """The mean over the queries under each draw [D]."""
        return weighted_mean(self.systems[system][index][figure], draws)


class Retriever:
    """A trained retriever with its base, and perhaps the adapter of all tasks: vectors of queries by every expert."""

    def __init__(self, folder: Path, multi_task: Path | None = None) -> None:
        self.manifest = RetrieverManifest.read(folder)
        self.table = load_table(folder / "observations").train
        config = self.manifest.encoder
        self._encoder = AdaptedEncoder(Encoder(EncoderFiles.find(config), config))
        self.domains = list(self.manifest.domains)
        adapters = {self.expert(domain): folder / "adapters" / domain for domain in self.domains}
        self._encoder.load({**adapters, **({_MULTI_TASK: multi_task} if multi_task else {})})

    def expert(self, domain: str) -> str:
        """The expert of a domain."""
        return expert_name(self.manifest.base, domain)

    def vectors(self, queries: Sequence[str]) -> dict[str, FloatArray]:
        """Of every expert and of the multi-task adapter: [Q, D] each."""
        tokens = self._encoder.tokenize(queries)
        vectors = {self.manifest.base: self._encoder.encode(tokens, [None] * len(tokens))}
        for name in self._encoder.names:
            vectors[name] = self._encoder.encode(tokens, [name] * len(tokens))
        return vectors

    def route(self, queries: Sequence[str], aggregation: Aggregation) -> list[str]:
        """The expert of each query."""
        options = {"aggregation": aggregation, "embedder": self.manifest.encoder}
        router = create_router("router_retriever", options).fit(self.table)
        estimates = router.estimate([Query(text=text) for text in queries], router.cards)
        return [router.cards[place].name for place in estimates.quality.argmax(1)]

    def classify(self, queries: Sequence[str]) -> list[str]:
        """The expert of the domain that a classifier of base embeddings names, trained on the pilots' queries."""
        from sklearn.linear_model import LogisticRegression

        embedder = shared_embedder(self.manifest.encoder)
        model = LogisticRegression(max_iter=1000, class_weight="balanced")
        model.fit(embedder.embed(self.table.texts), list(self.table.tasks))
        return [self.expert(domain) for domain in model.predict(embedder.embed(queries))]


def evaluate(retriever: Retriever, collections: Collections, on_progress: OnProgress = lambda *_: None) -> Measured:
    """Measure every system; an oracle of a collection without an adapter of its own is the base there."""
    base = retriever.manifest.base
    vectors = retriever.vectors(collections.queries)
    systems: dict[str, dict[str, dict[str, Floats]]] = {}

    def measured(name: str, of: FloatArray) -> None:
        scores = of @ collections.documents.T
        systems[name] = {index: collections.measure(scores, mixed=index == "mixed") for index in ("alone", "mixed")}
        on_progress(name, 1, 1)

    def chosen(experts: Sequence[str]) -> FloatArray:
        return np.array([vectors[expert][row] for row, expert in enumerate(experts)])

    systems["bm25"] = _bm25(collections)
    measured("base", vectors[base])
    if _MULTI_TASK in vectors:
        measured(_MULTI_TASK, vectors[_MULTI_TASK])
    routed = {way: retriever.route(collections.queries, way) for way in get_args(Aggregation)}
    routed["classifier"] = retriever.classify(collections.queries)
    own = [retriever.expert(name) if name in retriever.domains else base for name in collections.names]
    routed["dataset_oracle"] = [own[collection] for collection in collections.of_query]
    for name, experts in routed.items():
        measured(name, chosen(experts))
    experts = [*map(retriever.expert, retriever.domains), base]
    systems["query_oracle"] = _query_oracle(collections, [vectors[name] for name in experts])
    return Measured(systems, routed)


def measure_routed(retriever: Retriever, collections: Collections, aggregation: Aggregation) -> Measured:
    """RouterRetriever by one aggregation alone."""
    vectors = retriever.vectors(collections.queries)
    experts = retriever.route(collections.queries, aggregation)
    scores = np.array([vectors[expert][row] for row, expert in enumerate(experts)]) @ collections.documents.T
    found = {index: collections.measure(scores, mixed=index == "mixed") for index in ("alone", "mixed")}
    return Measured({aggregation: found}, {aggregation: experts})


def _bm25(collections: Collections) -> dict[str, dict[str, Floats]]:
    indexes = [BM25(corpus.texts) for corpus in collections.corpora]
    alone = np.array([np.concatenate([index.scores(query) for index in indexes]) for query in collections.queries])
    one = BM25([text for corpus in collections.corpora for text in corpus.texts])
    mixed = np.array([one.scores(query) for query in collections.queries])
    return {"alone": collections.measure(alone, mixed=False), "mixed": collections.measure(mixed, mixed=True)}


def _query_oracle(collections: Collections, vectors: Sequence[FloatArray]) -> dict[str, dict[str, Floats]]:
    found: dict[str, dict[str, Floats]] = {}
    for index in ("alone", "mixed"):
        each = [collections.measure(v @ collections.documents.T, mixed=index == "mixed") for v in vectors]
        best = np.array([figures["ndcg@10"] for figures in each]).argmax(0)
        rows = np.arange(len(best))
        found[index] = {name: np.array([figures[name] for figures in each])[best, rows] for name in FIGURES}
    return found


def query_draws(collections: Collections, *, resamples: int = 2000) -> dict[str, FloatArray]:
    """Bootstrap weights [D, Q]: of all queries alike, of each collection's alone, and of all collections alike."""
    draws = bootstrap(len(collections.queries), resamples=resamples)
    found = {"queries": draws}
    per_collection = []
    for place, name in enumerate(collections.names):
        own = np.where(collections.of_query == place, draws, 0).astype(np.float32)
        found[name] = own
        per_collection.append(own / np.maximum(own.sum(1, keepdims=True), 1))
    found["collections"] = np.sum(per_collection, axis=0, dtype=np.float32)
    return found
