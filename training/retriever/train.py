"""`router-service train retriever`: an adapter for each domain, the pilots that route to them, and what serves them.

    pairs      of each corpus: judged training queries, or sentences and the rest of their document; judged test queries
               are never read
    adapters   one a domain, on the query side of the frozen encoder
    observe    every expert on a sample of every domain's queries: nDCG@10 among the domain's texts
    pilots     the router `router_retriever`, fitted on these observations

    OUT/adapters/DOMAIN/     PEFT's files
    OUT/observations/        the table of observations
    OUT/router/              the router
    OUT/fleet.yaml           encoder and adapters as experts
    OUT/policies/            the policy `embeddings`, which routes by the router
    OUT/retriever.json       how it was made

A domain's adapter and its observations do not depend on the other domains that come later: with an earlier OUT as
`start`, what is there is taken over as it is, and only new domains are trained and observed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.cards import ExpertCard
from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles
from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray, Observation
from routers.embedder import Embedder, shared_embedder
from routers.registry import create_router
from routers.router_retriever import Aggregation
from training.errors import TrainJobError
from training.manifest import git_commit, package_versions
from training.observations import ObservedQuery, load_table, read_rows, write_table
from training.retriever.corpus import Corpus, normalised, read_corpus, sha256_of
from training.retriever.fit import AdapterConfig, fit_adapter
from training.retriever.measures import BM25, own_ndcg
from training.retriever.pairs import Pool, pairs_of
from training.work_folder import publish, started_at, work_folder

OnProgress = Callable[[str, int, int], None]
"""Hears of a step's name, how much of it is done, and how much there is."""

MANIFEST = "retriever.json"
CHECKPOINT_EVERY_S = 20.0
_EMBED_BATCH = 512
_TOPIC_WORDS = 8


class RetrieverSpec(BaseModel):
    """What to train. Domains are named as their folders are; `base` is the encoder's name as an expert.

    `pilot_queries` are the most of a domain on which the experts are observed, held-out ones first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpora: tuple[Path, ...] = Field(min_length=1)
    out: Path
    start: Path | None = None
    base: str = Field(default="search", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    encoder: EmbedderConfig = EmbedderConfig()
    adapter: AdapterConfig = AdapterConfig()
    aggregation: Aggregation = "mean"
    most_pairs: int = Field(default=6000, ge=20)
    pilot_queries: int = Field(default=150, ge=1)
    seed: int = Field(default=0, ge=0)


class Domain(BaseModel):
    """How a domain's adapter came about. `key` is a hash of all that decides it; nDCG@10 is on held-out pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    documents: int
    train_pairs: int
    held_out_pairs: int
    steps: int
    scale: float
    held_out_ndcg: dict[str, float]
    topic: str


class RetrieverManifest(BaseModel):
    """How a retriever was made. `run` is a hash of all that decides it; times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    base: str
    encoder: EmbedderConfig
    encoder_sha256: str
    adapter: AdapterConfig
    aggregation: Aggregation
    seed: int
    domains: dict[str, Domain]
    versions: dict[str, str]
    git_commit: str | None
    started_at: float
    finished_at: float

    @classmethod
    def read(cls, folder: Path) -> RetrieverManifest:
        """The manifest in a retriever's folder. Raises `TrainJobError`."""
        try:
            return cls.model_validate_json((folder / MANIFEST).read_text())
        except (OSError, ValidationError) as error:
            raise TrainJobError(f"{folder} holds no trained retriever: {error}") from error


def train_retriever(
    spec: RetrieverSpec, *, resume: bool = True, on_progress: OnProgress = lambda *_: None
) -> RetrieverManifest:
    """Train as `spec` says and leave the retriever in `spec.out`, whole or not at all; returns its manifest.

    A killed run goes on where it was, in `OUT.part`. Raises `TrainJobError`, `CorpusError` or `ExpertConfigError`.
    """
    corpora = [read_corpus(folder) for folder in spec.corpora]
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        raise TrainJobError(f"two corpora have the same folder name, which is their domain's: {names}")
    for name in names:
        _check_name(spec.base, name)
    keys = {corpus.name: domain_key(spec, corpus) for corpus in corpora}
    old = RetrieverManifest.read(spec.start) if spec.start else None
    run = _run_key(spec, keys, old)
    if spec.out.exists():
        return _finished(spec.out, run)
    with work_folder(spec.out, run, resume) as work:
        return _Run(spec, run, work, keys, old, on_progress).finish(corpora)


def domain_key(spec: RetrieverSpec, corpus: Corpus) -> str:
    """A hash of all that decides a domain's adapter, but not of where things lie."""
    decides = {
        "corpus": sha256_of(corpus.folder),
        "encoder": EncoderFiles.find(spec.encoder).fingerprint.hex(),
        "adapter": spec.adapter.model_dump(mode="json"),
        "pairs": [spec.most_pairs, spec.pilot_queries, spec.seed],
        "torch": package_versions()["torch"],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _run_key(spec: RetrieverSpec, keys: Mapping[str, str], old: RetrieverManifest | None) -> str:
    """A hash of all that decides a retriever, but not of where things lie."""
    decides = {
        "base": spec.base,
        "aggregation": spec.aggregation,
        "domains": list(keys.items()),
        "from": old.run if old else None,
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


class _Run:
    def __init__(
        self,
        spec: RetrieverSpec,
        key: str,
        work: Path,
        keys: Mapping[str, str],
        old: RetrieverManifest | None,
        on_progress: OnProgress,
    ) -> None:
        self._spec = spec
        self._key = key
        self._work = work
        self._whole = work / "artefact"
        self._keys = keys
        self._old = old
        self._on_progress = on_progress
        self._embedder: Embedder = shared_embedder(spec.encoder)

    def finish(self, corpora: Sequence[Corpus]) -> RetrieverManifest:
        """Do what is left to do, and put the retriever in its place."""
        domains = {corpus.name: self._domain(corpus) for corpus in corpora}
        self._observe(corpora, domains)
        router = create_router(
            "router_retriever",
            {"aggregation": self._spec.aggregation, "embedder": self._spec.encoder, "seed": self._spec.seed},
        )
        router.fit(load_table(self._whole / "observations").train).save(self._whole / "router")
        write_fleet(self._whole, self._spec.base, self._spec.encoder, domains)
        manifest = RetrieverManifest(
            run=self._key,
            base=self._spec.base,
            encoder=self._spec.encoder,
            encoder_sha256=self._embedder.weights_sha256,
            adapter=self._spec.adapter,
            aggregation=self._spec.aggregation,
            seed=self._spec.seed,
            domains=domains,
            versions=package_versions(),
            git_commit=git_commit(),
            started_at=started_at(self._work),
            finished_at=time.time(),
        )
        _write(self._whole / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        publish(self._whole, self._spec.out)
        return manifest

    # Adapters

    def _domain(self, corpus: Corpus) -> Domain:
        """Train the domain's adapter, unless this run or the retriever to start from has it."""
        folder = self._whole / "adapters" / corpus.name
        kept = self._work / "state" / corpus.name / "domain.json"
        key = self._keys[corpus.name]
        if kept.is_file() and (known := Domain.model_validate_json(kept.read_text())).key == key:
            return known
        if (old := self._known(corpus.name)) and self._spec.start:
            shutil.copytree(self._spec.start / "adapters" / corpus.name, folder, dirs_exist_ok=True)
            return old
        pairs = pairs_of(corpus, seed=self._spec.seed, most=self._spec.most_pairs)
        if len(pairs.train) < 2 or not pairs.held_out:
            raise TrainJobError(f"{corpus.folder}: too few pairs of a query and a text can be made of it")
        trained = fit_adapter(
            pairs,
            folder,
            embed=lambda texts: self._embed(corpus.name, texts),
            encoder=self._spec.encoder,
            config=self._spec.adapter,
            seed=self._spec.seed,
            checkpoint=Checkpoint(
                self._work / "state" / corpus.name / key[:16],
                every_s=CHECKPOINT_EVERY_S,
                on_progress=lambda done, total: self._on_progress(f"train {corpus.name}", done, total),
            ),
        )
        domain = Domain(
            key=key,
            documents=len(corpus.ids),
            train_pairs=len(pairs.train),
            held_out_pairs=len(pairs.held_out),
            steps=trained.steps,
            scale=trained.scale,
            held_out_ndcg={f"{scale:g}": round(value, 6) for scale, value in trained.held_out.items()},
            topic=", ".join(BM25(corpus.texts).commonest(_TOPIC_WORDS)),
        )
        _write(kept, domain.model_dump_json())
        return domain

    def _known(self, name: str) -> Domain | None:
        """What the retriever to start from says of a domain that was made from the same."""
        old = self._old.domains.get(name) if self._old else None
        return old if old and old.key == self._keys[name] else None

    def _embed(self, name: str, texts: Sequence[str]) -> FloatArray:
        """The frozen encoder's vectors of a domain's texts; they stay in the cache on disk."""
        return embed_all(self._embedder, texts, f"embed {name}", self._on_progress)

    # Observations

    def _observe(self, corpora: Sequence[Corpus], domains: Mapping[str, Domain]) -> None:
        """What every expert makes of every domain's pilot queries; of a known domain, as it was observed before."""
        names = [self._spec.base, *(expert_name(self._spec.base, domain) for domain in domains)]
        cards = [
            ExpertCard(name=name, kind="embedding", description=_describe(name, self._spec.base, domains))
            for name in names
        ]
        files = EncoderFiles.find(self._spec.encoder)
        encoder = AdaptedEncoder(Encoder(files, self._spec.encoder))
        encoder.load({expert_name(self._spec.base, name): self._whole / "adapters" / name for name in domains})
        rows: list[ObservedQuery] = []
        for corpus in corpora:
            old = self._old_rows(corpus.name) if self._known(corpus.name) else []
            rows += old or self._observed(corpus, encoder, names)
        write_table(self._whole / "observations", cards, rows)

    def _old_rows(self, domain: str) -> list[ObservedQuery]:
        """A domain's queries with what was observed of the base and of adapters that are still the same."""
        if not self._spec.start:
            return []
        names = {self._spec.base, *(expert_name(self._spec.base, name) for name in self._keys if self._known(name))}
        rows = [row for row in read_rows(self._spec.start / "observations") if row.task == domain]
        kept = [[pair for pair in row.experts if pair.expert in names] for row in rows]
        return [row_with(row, experts) for row, experts in zip(rows, kept, strict=True) if experts]

    def _observed(self, corpus: Corpus, encoder: AdaptedEncoder, names: Sequence[str]) -> list[ObservedQuery]:
        pairs = pairs_of(corpus, seed=self._spec.seed, most=self._spec.most_pairs)
        everything = [*pairs.held_out, *pairs.train]
        first = {normalised(pair.query): place for place, pair in reversed(list(enumerate(everything)))}
        asked = sorted(first.values())[: self._spec.pilot_queries]
        pool = Pool(everything)
        texts, counted = self._embed(corpus.name, pool.texts), pool.counted(asked)
        tokens = encoder.tokenize([everything[place].query for place in asked])
        quality: dict[str, list[float]] = {}
        for name in names:
            vectors = encoder.encode(tokens, [None if name == self._spec.base else name] * len(tokens))
            quality[name] = own_ndcg(vectors, texts, pool.own[asked], counted)
            self._on_progress(f"observe {corpus.name}", len(quality), len(names))
        return [
            ObservedQuery(
                id=f"{corpus.name}-{i}",
                query=everything[place].query,
                split="train",
                task=corpus.name,
                experts=[
                    Observation(query_id=f"{corpus.name}-{i}", expert=name, quality=quality[name][i], cost_usd=0.0)
                    for name in names
                ],
            )
            for i, place in enumerate(asked)
        ]


def expert_name(base: str, domain: str) -> str:
    """The name of a domain's adapter as an expert."""
    return f"{base}-{domain}"


def _check_name(base: str, domain: str) -> None:
    """Raise `TrainJobError` for a domain that could not be the name of an expert."""
    try:
        ExpertCard(name=expert_name(base, domain), kind="embedding")
    except ValidationError as error:
        raise TrainJobError(
            f"the folder {domain!r} names its domain, and {expert_name(base, domain)!r} can be no expert's name "
            f"({error.errors()[0]['msg']}): rename the folder"
        ) from error


def row_with(row: ObservedQuery, experts: Sequence[Observation]) -> ObservedQuery:
    """The row with these observations alone."""
    return ObservedQuery(id=row.id, query=row.query, split=row.split, task=row.task, experts=experts)


def embed_all(embedder: Embedder, texts: Sequence[str], step: str, on_progress: OnProgress) -> FloatArray:
    """Vectors of many texts, float32 [N, D], batch by batch, so that a killed run finds what it had in the cache."""
    parts = [np.zeros((0, embedder.dimensions), np.float32)]
    for start in range(0, len(texts), _EMBED_BATCH):
        parts.append(embedder.embed(texts[start : start + _EMBED_BATCH]))
        on_progress(step, min(start + _EMBED_BATCH, len(texts)), len(texts))
    return np.concatenate(parts)


def write_fleet(folder: Path, base: str, encoder: EmbedderConfig, domains: Mapping[str, Domain]) -> None:
    """The fleet file and the policy that serve a retriever in `folder`."""
    experts: list[dict[str, Any]] = [
        {"name": base, "description": _describe(base, base, domains), "encoder": encoder.model_dump(mode="json")}
    ]
    experts += [
        {
            "name": expert_name(base, name),
            "description": _describe(expert_name(base, name), base, domains),
            "tags": [name],
            "adapter": {"base": base, "path": f"./adapters/{name}"},
        }
        for name in domains
    ]
    policy = {
        "name": "embeddings",
        "description": "Each text to the expert whose pilots are most like it.",
        "serves": "embeddings",
        "objective": {"quality": 1, "cost": 0},
        "router": {"name": "router_retriever", "artefact": "../router"},
    }
    _write(folder / "fleet.yaml", yaml.safe_dump({"experts": experts}, sort_keys=False, allow_unicode=True))
    _write(folder / "policies" / "embeddings.yaml", yaml.safe_dump(policy, sort_keys=False))


def _describe(name: str, base: str, domains: Mapping[str, Domain]) -> str:
    for domain, made in domains.items():
        if name == expert_name(base, domain):
            return f"Embeds queries about {made.topic}."
    return "Embeds documents, and queries of any subject."


def _finished(out: Path, run: str) -> RetrieverManifest:
    manifest = RetrieverManifest.read(out)
    if manifest.run != run:
        raise TrainJobError(
            f"{out} holds another retriever (other corpora, options, versions or --from), and a service may be "
            "using it: choose another folder"
        )
    return manifest


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
