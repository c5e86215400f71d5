"""GLIDER's global half (EMNLP 2025, arXiv 2410.07172): which adapters suit a query's task, before any token is seen.

An expert's instruction says in a sentence what its task is; it is the description on its card. What a query asks for
is put as an instruction as well, by a configured expert (`routers.guide`), and the score of an expert is the cosine of
both instructions' embeddings. Nothing but the caller's own text tells the task: a query carries no label.

Without an instruction the query's own embedding stands in. A question is seldom worded like the description of its
task, so it is then compared with what each expert was seen to be good at: the mean of the `nearest` largest cosines to
the expert's examples. The paper is sure of a task from a cosine of .8 on; for queries each expert has a bound of its
own, which `sure_share` of its examples pass when they are compared with its others.

An expert's rows depend on its own observations and card alone where the table holds no other's.

As a router its quality is (1 + score) / 2, a ranking and not a probability. Its other use is the bias of a gate inside
the model (`experts.mixing`): alpha * score, -inf but for the `most_adapters` best, so that a gate over a thousand
adapters has few to choose from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.search_space import Range

Source = Literal["instruction", "query"]
"""What was compared with the experts: an instruction that was written for the query, or the query itself."""

_NEVER = 2.0  # a bound that no cosine passes
_FEWEST_FOR_A_BOUND = 4  # examples


class GliderConfig(RouterConfig):
    """`threshold`, `sure` and `unsure` are the paper's: alpha is `unsure`, and `sure` more from the threshold on.

    `most_adapters` are left to a gate. `examples` are kept of each expert. For a query that stands for its
    instruction, `nearest` of them count, and `sure_share` of an expert's examples pass its bound.
    """

    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.8
    sure: Annotated[float, Field(ge=0)] = 100.0
    unsure: Annotated[float, Field(ge=0)] = 3.0
    most_adapters: Annotated[int, Field(ge=1)] = 8
    examples: Annotated[int, Field(ge=1), Range(8, 64, log=True)] = 32
    nearest: Annotated[int, Field(ge=1), Range(1, 8)] = 3
    sure_share: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, slots=True)
class Guidance:
    """What the global half tells the gate about one request.

    `scores` are the cosines of all experts; `bias` is what is added to the gate's scores, -inf for those left out;
    `sure` says whether some score passes its threshold.
    `source` says what was compared, `instruction` what was written for the query, and `why` why nothing was.
    """

    scores: Mapping[str, float]
    bias: Mapping[str, float]
    source: Source
    sure: bool
    instruction: str | None = None
    why: str = ""

    @property
    def gate_bias(self) -> dict[str, float | None]:
        """The bias as JSON, which has no infinity: null leaves an adapter out."""
        return {name: None if bias == -np.inf else bias for name, bias in self.bias.items()}

    def to_json(self) -> dict[str, Any]:
        """The guidance as JSON."""
        return {
            "scores": dict(self.scores),
            "gate_bias": self.gate_bias,
            "sure": self.sure,
            "source": self.source,
            "instruction": self.instruction,
            "why": self.why,
        }


class GliderRouter(FittedRouter[GliderConfig]):
    """Likeness of a query to what experts are for."""

    name = "glider"
    config_type = GliderConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        self._instructions = self._descriptions(table.cards)
        order = _shuffled(table.texts, self.config.seed)
        best = [self._standing_out(table.quality, e, order) for e in range(len(table.cards))]
        width = max(1, *map(len, best))
        examples = np.zeros((len(best), width, embeddings.shape[1]), np.float32)
        for e, rows in enumerate(best):
            examples[e, : len(rows)] = embeddings[rows]
        self._take(examples, np.array([len(rows) for rows in best], np.int64))
        self._bounds = np.array([self._bound(e) for e in range(len(best))], np.float32)

    def _standing_out(self, quality: FloatArray, expert: int, order: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """The queries on which an expert was the furthest above the others: [n] rows, at most `examples`.

        Of equals those that come first in `order`.
        """
        others = np.delete(quality, expert, axis=1)
        known = np.isfinite(others)
        mean = np.where(known, others, 0).sum(1) / np.maximum(known.sum(1), 1)
        above = np.nan_to_num(quality[:, expert], nan=0.0) - mean
        ranked = order[np.argsort(-above[order], kind="stable")]
        found: npt.NDArray[np.intp] = ranked[above[ranked] > 0][: self.config.examples]
        return found

    def _take(self, examples: FloatArray, counts: npt.NDArray[np.int64]) -> None:
        """Examples [K, N, D], of which each expert's first `counts` [K] are some."""
        self._examples, self._counts = examples, counts
        self._flat = np.ascontiguousarray(examples.reshape(-1, examples.shape[-1]).T)
        self._blank = np.arange(examples.shape[1]) >= counts[:, None]

    def _bound(self, expert: int) -> float:
        """The likeness to the expert's other examples that `sure_share` of them have."""
        own = self._examples[expert, : self._counts[expert]]
        if len(own) < _FEWEST_FOR_A_BOUND:
            return _NEVER
        cosines = own @ own.T
        np.fill_diagonal(cosines, -1)
        return float(np.quantile(_mean_of_largest(cosines, self.config.nearest), 1 - self.config.sure_share))

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        tokens = np.broadcast_to(self.profile.output_tokens, (len(embeddings), len(self.cards)))
        return Prediction((1 + self._of_queries(embeddings)) / np.float32(2), np.ascontiguousarray(tokens))

    def _of_queries(self, embeddings: FloatArray) -> FloatArray:
        """Likeness of queries [B, D] to each expert's examples, or to its instruction where it has none: [B, K]."""
        cosines = (embeddings @ self._flat).reshape(len(embeddings), *self._blank.shape)
        scores = _mean_of_largest(np.where(self._blank, -np.inf, cosines), self.config.nearest)
        bare = self._counts == 0
        scores[:, bare] = embeddings @ self._instructions[bare].T
        return scores

    def guidance(self, texts: Sequence[str], instructions: Sequence[str | None]) -> list[Guidance]:
        """What to tell a gate about each query, of which an instruction was written or None."""
        written = [i for i, instruction in enumerate(instructions) if instruction is not None]
        bare = [i for i, instruction in enumerate(instructions) if instruction is None]
        scores = np.zeros((len(texts), len(self.cards)), np.float32)
        bounds = np.where([[instruction is None] for instruction in instructions], self._bounds, self.config.threshold)
        scores[written] = self._embed([instructions[i] or "" for i in written]) @ self._instructions.T
        scores[bare] = self._of_queries(self._embed([texts[i] for i in bare]))
        bias = self._bias(scores, bounds.astype(np.float32))
        sure: npt.NDArray[np.bool_] = np.any(scores > bounds, axis=1)
        names = [card.name for card in self.cards]
        return [
            Guidance(
                scores=dict(zip(names, own_scores.tolist(), strict=True)),
                bias=dict(zip(names, own_bias.tolist(), strict=True)),
                source="query" if instruction is None else "instruction",
                sure=bool(own_sure),
                instruction=instruction,
            )
            for own_scores, own_bias, own_sure, instruction in zip(scores, bias, sure, instructions, strict=True)
        ]

    def _bias(self, scores: FloatArray, bounds: FloatArray) -> FloatArray:
        import torch

        from experts.mixing.post_hoc import glider_bias

        config = self.config
        given = torch.from_numpy(scores), torch.from_numpy(bounds)
        bias: FloatArray = glider_bias(given[0], threshold=given[1], sure=config.sure, unsure=config.unsure).numpy()
        return _narrowed(bias, config.most_adapters)

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {
            "glider.instructions": self._instructions,
            "glider.examples": self._examples,
            "glider.counts": self._counts,
            "glider.bounds": self._bounds,
        }

    def _restore(self, artefact: Artefact) -> None:
        experts, dimensions = len(self.cards), self._used_embedder().dimensions
        self._instructions = artefact.array("glider.instructions", experts, dimensions)
        examples = artefact.array("glider.examples", experts, None, dimensions)
        counts = artefact.array("glider.counts", experts)
        if not 0 <= counts.min() <= counts.max() <= examples.shape[1]:
            artefact.refuse("counts examples that are not there")
        self._take(examples, counts)
        self._bounds = artefact.array("glider.bounds", experts)


def _shuffled(texts: Sequence[str], seed: int) -> npt.NDArray[np.intp]:
    """An order by hash, in which two texts keep their places whichever others there are."""
    keys = [hashlib.sha256(f"{seed}:{text}".encode("utf-8", "replace")).digest() for text in texts]
    return np.array(sorted(range(len(texts)), key=keys.__getitem__), np.intp)


def _mean_of_largest(values: FloatArray, count: int) -> FloatArray:
    """Mean of the `count` largest along the last axis, of which -inf is none; 0 where there are none at all."""
    count = min(count, values.shape[-1])
    largest = np.partition(values, values.shape[-1] - count, axis=-1)[..., -count:]
    known = np.isfinite(largest)
    mean: FloatArray = np.where(known, largest, 0).sum(-1) / np.maximum(known.sum(-1), 1)
    return mean.astype(np.float32)


def _narrowed(bias: FloatArray, most: int) -> FloatArray:
    """-inf but for the `most` largest of each row."""
    if bias.shape[1] <= most:
        return bias
    kept = np.argsort(-bias, axis=1, kind="stable")[:, :most]
    narrowed = np.full_like(bias, -np.inf)
    np.put_along_axis(narrowed, kept, np.take_along_axis(bias, kept, axis=1), axis=1)
    return narrowed
