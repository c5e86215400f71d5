"""What routing costs beside encoding: batches of queries through the base alone, and through base, pilots, adapters.

Texts are tokenized at every pass, as in a service, where router and expert each read the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import Encoder, EncoderFiles
from routers.contracts import FloatArray
from routers.registry import load_router
from routers.router_retriever import RouterRetriever
from training.observations import read_rows
from training.retriever.train import RetrieverManifest

_BATCH, _ROUNDS = 256, 7
_MANY_EXPERTS, _PILOTS_EACH = 1000, 4


def bench(folder: Path) -> dict[str, float]:
    """Milliseconds, each the median of several rounds on one thread, for a batch of 256 queries of all domains."""
    torch.set_num_threads(1)
    manifest = RetrieverManifest.read(folder)
    encoder = AdaptedEncoder(Encoder(EncoderFiles.find(manifest.encoder), manifest.encoder))
    names = {f"{manifest.base}-{domain}": folder / "adapters" / domain for domain in manifest.domains}
    encoder.load(names)
    router = load_router(folder / "router")
    if not isinstance(router, RouterRetriever):
        raise TypeError(f"{folder} holds a {router.name!r} router")
    rows = [row.query for row in read_rows(folder / "observations")]
    queries = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:_BATCH]]
    nothing = [None] * len(queries)
    owners = [router.cards[place].name for place in router.owners]

    def plain() -> FloatArray:
        return encoder.encode(encoder.tokenize(queries), nothing)

    def routed() -> None:
        chosen = [owners[place] for place in router.similarity(plain()).argmax(1)]
        encoder.encode(encoder.tokenize(queries), [None if name == manifest.base else name for name in chosen])

    base = _median_ms(plain)
    both = _median_ms(routed)
    batch = plain()
    query, many = batch[:1], _many_experts(router, batch.shape[1])
    return {
        "base_encoder_ms": base,
        "routing_and_encoding_ms": both,
        "times_the_base": both / base,
        "mean_pilots_of_1000_experts_one_query_ms": _median_ms(lambda: many.similarity(query), 200),
        "mean_pilots_of_1000_experts_256_queries_ms": _median_ms(lambda: many.similarity(batch), 20),
    }


def _many_experts(router: RouterRetriever, dimensions: int) -> RouterRetriever:
    """A router of a thousand experts with random pilots."""
    pilots = np.random.default_rng(0).normal(size=(_MANY_EXPERTS * _PILOTS_EACH, dimensions)).astype(np.float32)
    many = RouterRetriever(router.config)
    many.take(pilots, np.repeat(np.arange(_MANY_EXPERTS), _PILOTS_EACH))
    return many


def _median_ms(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))
