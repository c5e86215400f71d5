"""One adapter for all domains: what routing between several has to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experts.embedding.encoder import EmbedderConfig
from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray
from training.retriever.corpus import Corpus
from training.retriever.fit import AdapterConfig, Trained, fit_adapter
from training.retriever.pairs import Pair, Pairs, pairs_of


def fit_multi_task(
    corpora: Sequence[Corpus],
    folder: Path,
    *,
    embed: Callable[[Sequence[str]], FloatArray],
    encoder: EmbedderConfig,
    config: AdapterConfig,
    steps: int,
    most_pairs: int,
    seed: int,
    checkpoint: Checkpoint,
) -> Trained:
    """Train one adapter on the pairs of all domains together, in as many steps as their own adapters took in all."""
    parts = [pairs_of(corpus, seed=seed, most=most_pairs) for corpus in corpora]
    starts = np.cumsum([0, *(len(corpus.ids) for corpus in corpora)]).tolist()
    train = [_moved(pair, start) for part, start in zip(parts, starts, strict=False) for pair in part.train]
    held_out = [_moved(pair, start) for part, start in zip(parts, starts, strict=False) for pair in part.held_out]
    return fit_adapter(
        Pairs(train, held_out),
        folder,
        embed=embed,
        encoder=encoder,
        config=config.model_copy(update={"max_steps": steps, "epochs": 1 + steps}),
        seed=seed,
        checkpoint=checkpoint,
    )


def _moved(pair: Pair, start: int) -> Pair:
    """The pair with its documents' places among those of all domains."""
    relevant = frozenset(start + document for document in pair.relevant)
    return Pair(pair.query, pair.text, start + pair.document, relevant)
