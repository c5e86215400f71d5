"""From logits to the next tokens, for all rows of a batch at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.local.request import Sampling


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability, before temperature and penalties."""

    token: int
    logprob: float


class Sampler:
    """What the choice of one sequence's tokens depends on beside the logits: the same alone and among others.

    `choice` tells apart the answers to one seeded request.
    """

    def __init__(self, sampling: Sampling, choice: int) -> None:
        self.sampling = sampling
        self._counts: Tensor | None = None
        seed = None if sampling.seed is None else (sampling.seed % 2**64) + (choice << 64)
        self._random = random.Random(seed)
        self._bias: tuple[Tensor, Tensor] | None = None

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits before anything else."""
        s = self.sampling
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty)

    def draw(self) -> float:
        """A random number in [0, 1)."""
        return self._random.random()

    def observe(self, token: int) -> None:
        """Count a chosen token, for the penalties."""
        if self._counts is not None:
            self._counts[token] += 1

    def adjust(self, logits: Tensor) -> None:
        """Add bias and penalties, as OpenAI defines them, to `logits` [V]."""
        s = self.sampling
        if s.logit_bias:
            if self._bias is None:
                tokens, values = zip(*s.logit_bias.items(), strict=True)
                self._bias = torch.tensor(tokens, device=logits.device), torch.tensor(values, device=logits.device)
            logits[self._bias[0]] += self._bias[1]
        if s.presence_penalty or s.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits -= s.presence_penalty * (self._counts > 0) + s.frequency_penalty * self._counts


class BatchSampler:
    """Chooses the next token of each row of a batch, as long as its rows stay the same.

    Every row's numbers depend on that row alone, but for rounding.
    """

    def __init__(self, rows: Sequence[Sampler], device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._adjusting = [i for i, row in enumerate(rows) if row.adjusts]
        self._drawing = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        sampled = [rows[i].sampling for i in self._drawing]
        self._index = torch.tensor(self._drawing, dtype=torch.long, device=device)
        self._temperature = self._column([s.temperature for s in sampled])
        self._min_p = self._column([s.min_p for s in sampled]) if any(s.min_p for s in sampled) else None
        nucleus = [i for i, s in enumerate(sampled) if s.top_k or s.top_p < 1]
        self._nucleus = torch.tensor(nucleus, dtype=torch.long, device=device) if nucleus else None
        self._top_k = torch.tensor([[sampled[i].top_k or 2**62] for i in nucleus], dtype=torch.long, device=device)
        self._top_p = self._column([sampled[i].top_p for i in nucleus])

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens [B] for `logits` [B, V] float32, which must be finite; they are changed."""
        for i in self._adjusting:
            self._rows[i].adjust(logits[i])
        tokens = logits.argmax(-1)
        if self._drawing:
            tokens[self._index] = self._draw(logits[self._index])
        for i in self._adjusting:
            self._rows[i].observe(int(tokens[i]))
        return tokens

    def _draw(self, logits: Tensor) -> Tensor:
        """A token for each of the rows that are not greedy: where its random number falls among the probabilities."""
        probs = torch.softmax(logits / self._temperature, -1)
        if self._min_p is not None:
            probs.masked_fill_(probs < self._min_p * probs.amax(-1, keepdim=True), 0)
        if self._nucleus is not None:
            probs[self._nucleus] = _kept(probs[self._nucleus], self._top_k, self._top_p)
        sums = probs.cumsum(-1, dtype=torch.float64)
        drawn = torch.tensor([[self._rows[i].draw()] for i in self._drawing], dtype=torch.float64, device=self._device)
        return torch.searchsorted(sums, drawn * sums[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)[:, 0]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]


def _kept(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`probs` [S, V] with those tokens at 0 that top-k and top-p [S, 1] leave out; at least the likeliest stays."""
    values, order = probs.sort(descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill(places >= top_k, 0)
    before = values.cumsum(-1) - values
    left_out = (before >= top_p * values.sum(-1, keepdim=True)) & (places > 0)
    return torch.zeros_like(probs).scatter_(1, order, values.masked_fill(left_out, 0))


def logprobs_of(
    logits: Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[tuple[TokenLogprob, list[TokenLogprob]]]:
    """For each row of `logits` [B, V], the log-probability of its token, and its so many likeliest tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, likeliest = (side.tolist() for side in logprobs.topk(min(max(tops), logits.shape[1])))
    return [
        (TokenLogprob(token, own), [TokenLogprob(t, v) for t, v in zip(ts[:top], vs[:top], strict=True)])
        for token, own, top, ts, vs in zip(tokens, chosen, tops, likeliest, values, strict=True)
    ]
