"""One LoRA adapter on the query side of a frozen encoder, trained with in-batch negatives.

Documents stay as the frozen encoder has them, so their vectors are computed once, before training, and an index that
exists stays good. The loss of a batch of pairs is the cross-entropy of each query's own text among those of others,
cosines over a temperature; what else answers the query is left out of it. How much of what was learnt is kept is chosen
on held-out pairs: scales from nothing to all are tried (as WiSE-FT interpolates, arXiv 2109.01903), so that an adapter
that would harm its domain ends as the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from experts.embedding.adapters import write_encoder
from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles, padded
from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray
from training.metrics import Floats
from training.retriever.measures import own_ndcg
from training.retriever.pairs import Pair, Pairs, Pool

SCALES = (0.0, 0.5, 1.0)
_FEWEST_BATCHES = 16  # of an epoch
_BUCKET = 8  # batches that are drawn together and sorted by length, so that little is padded


class AdapterConfig(BaseModel):
    """How an adapter is trained, with the paper's temperature, rank and alpha.

    `negatives`: a query's wrong answers are the other texts of its `batch` (the paper's), or all of its `domain`, whose
    vectors are there anyway. A step sees `batch_size` queries, fewer where a domain has few pairs. The defaults are
    those that did best on held-out pairs (docs/retrieval.md); the paper's are `batch` and a learning rate of 1e-4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[str, ...] = ("query", "value")
    temperature: float = Field(default=0.05, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    batch_size: int = Field(default=32, ge=2)
    epochs: int = Field(default=4, ge=1)
    max_steps: int = Field(default=100, ge=1)
    query_tokens: int = Field(default=64, ge=8)
    negatives: Literal["batch", "domain"] = "domain"


@dataclass(frozen=True, slots=True)
class Trained:
    """What became of a training: held-out nDCG@10 of every scale tried, and the scale that was kept."""

    scale: float
    held_out: Mapping[float, float]
    steps: int


def fit_adapter(
    pairs: Pairs,
    folder: Path,
    *,
    embed: Callable[[Sequence[str]], FloatArray],
    encoder: EmbedderConfig,
    config: AdapterConfig,
    seed: int,
    checkpoint: Checkpoint,
) -> Trained:
    """Train on `pairs.train`, with the frozen vectors [N, D] that `embed` gives of texts; write a PEFT adapter.

    Deterministic for a seed, also over a kill: `checkpoint` has the state to go on from.
    """
    torch.manual_seed(seed)
    model = _QuerySide(encoder, config)
    pool = Pool(pairs.train)
    queries = model.tokenize([pair.query for pair in pairs.train])
    steps = _train(model, queries, pool, torch.from_numpy(embed(pool.texts)), seed, checkpoint)
    everything = Pool([*pairs.held_out, *pairs.train])
    texts = embed(everything.texts)
    measured = {scale: model.measure(pairs.held_out, everything, texts, scale) for scale in SCALES}
    scale = cautious_scale(measured)
    model.save(folder, scale)
    return Trained(scale, {scale: float(values.mean()) for scale, values in measured.items()}, steps)


def cautious_scale(measured: Mapping[float, Floats]) -> float:
    """The smallest scale that the held-out pairs [Q] cannot tell from the best: within one standard error of it.

    Pairs made of documents are not what people ask: of what they cannot decide, the base knows more.
    """
    best = measured[max(measured, key=lambda scale: measured[scale].mean())]

    def equals_best(values: Floats) -> bool:
        lost = best - values
        return bool(lost.mean() <= lost.std() / np.sqrt(len(lost)))

    return min(scale for scale, values in measured.items() if equals_best(values))


def _train(
    model: _QuerySide,
    queries: Sequence[Sequence[int]],
    pool: Pool,
    texts: Tensor,
    seed: int,
    checkpoint: Checkpoint,
) -> int:
    """Train the adapter; returns how many steps it took."""
    config = model.config
    size = min(config.batch_size, max(2, len(queries) // _FEWEST_BATCHES))
    steps = min(config.max_steps, config.epochs * (len(queries) // size))
    optimizer = torch.optim.AdamW(model.parameters, lr=config.learning_rate, weight_decay=0.0)
    done, arrays = checkpoint.load() or (0, None)
    if arrays is not None:
        model.restore(optimizer, arrays)
    for step, batch in enumerate(_batches([len(query) for query in queries], size, seed)):
        if step >= steps:
            break
        if step < done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
        vectors = model.forward([queries[i] for i in batch])
        loss = contrastive_loss(vectors, texts, pool, batch, config)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
        optimizer.step()
        checkpoint.step(step + 1, steps, lambda: model.state(optimizer))
    return steps


def contrastive_loss(vectors: Tensor, texts: Tensor, pool: Pool, batch: Sequence[int], config: AdapterConfig) -> Tensor:
    """Cross-entropy of each query's own text among the others, of the batch or of the domain.

    `vectors` [B, D] are of the queries of the pairs `batch`, `texts` [N, D] of the pool's. What answers a query beside
    its own text is not among the others.
    """
    own = pool.own[batch]
    candidates = np.unique(own) if config.negatives == "batch" else np.arange(len(texts))
    counted = torch.from_numpy(pool.counted(batch)[:, candidates])
    logits = (vectors @ texts[candidates].T / config.temperature).masked_fill(~counted, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.searchsorted(candidates, own)))


def _batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end, epoch after epoch, each drawn by the seed."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order) - size + 1, size * _BUCKET):
            bucket = sorted(order[start : start + size * _BUCKET].tolist(), key=lengths.__getitem__)
            batches = [bucket[i : i + size] for i in range(0, len(bucket) - size + 1, size)]
            yield from (batches[i] for i in rng.permutation(len(batches)))


class _QuerySide:
    """The encoder with one trainable adapter."""

    def __init__(self, encoder: EmbedderConfig, config: AdapterConfig) -> None:
        self.config = config
        self._encoder = Encoder(EncoderFiles.find(encoder), encoder)
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), lora_dropout=0.0)
        self._peft = get_peft_model(self._encoder.network, lora).eval()
        self.parameters = [parameter for parameter in self._peft.parameters() if parameter.requires_grad]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [tokens[: self.config.query_tokens] for tokens in self._encoder.tokenize(texts)]

    def forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = padded(tokens)
        return self._encoder.forward(torch.from_numpy(ids), torch.from_numpy(mask))

    def set_scale(self, scale: float) -> None:
        for module in self._peft.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                for name in module.scaling:
                    module.scaling[name] = scale * self.config.alpha / self.config.rank

    def measure(self, pairs: Sequence[Pair], pool: Pool, texts: FloatArray, scale: float) -> Floats:
        """nDCG@10 of each of the pool's first `pairs`, whose queries look for their texts among `texts` [N, D]."""
        self.set_scale(scale)
        vectors = self._encoder.encode_tokens(self.tokenize([pair.query for pair in pairs]))
        first = range(len(pairs))
        return np.array(own_ndcg(vectors, texts, pool.own[first], pool.counted(first)))

    def save(self, folder: Path, scale: float) -> None:
        """As PEFT has it, with the scale in alpha, and beside it of which encoder it is."""
        self._peft.peft_config["default"].lora_alpha = self.config.alpha * scale
        self._peft.save_pretrained(folder)
        write_encoder(folder, self._encoder.fingerprint)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a card, empty

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        arrays = {f"weight.{i}": parameter.detach().numpy().copy() for i, parameter in enumerate(self.parameters)}
        for i, parameter in enumerate(self.parameters):
            for name, value in optimizer.state[parameter].items():
                arrays[f"{name}.{i}"] = np.array(value.detach().numpy())
        return arrays

    def restore(self, optimizer: torch.optim.Optimizer, arrays: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(torch.from_numpy(arrays[f"weight.{i}"]))
                optimizer.state[parameter] = {
                    name: torch.from_numpy(arrays[f"{name}.{i}"]) for name in ("step", "exp_avg", "exp_avg_sq")
                }
