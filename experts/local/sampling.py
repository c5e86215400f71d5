"""From logits to the next token."""

from __future__ import annotations

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
    """Chooses the tokens of one sequence, with its own random numbers: the same alone and among others.

    `choice` tells apart the answers to one seeded request.
    """

    def __init__(self, sampling: Sampling, choice: int) -> None:
        self.sampling = sampling
        self._counts: Tensor | None = None
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + choice) % 2**64)

    def choose(self, logits: Tensor) -> int:
        """The next token for `logits` ([V], float32, on the CPU). Raises `RuntimeError` where they are not finite."""
        sampling = self.sampling
        logits = self._adjusted(logits)
        if sampling.temperature == 0:
            return int(logits.argmax())
        probs = _kept(torch.softmax(logits / sampling.temperature, dim=-1), sampling)
        return int(torch.multinomial(probs, 1, generator=self._random))

    def observe(self, token: int, vocabulary: int) -> None:
        """Count a chosen token, for the penalties."""
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros(vocabulary)
            self._counts[token] += 1

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits after bias and penalties, as OpenAI defines them."""
        sampling = self.sampling
        if sampling.logit_bias:
            logits = logits.clone()
            for token, bias in sampling.logit_bias.items():
                logits[token] += bias
        if self._counts is not None:
            presence = sampling.presence_penalty * (self._counts > 0)
            logits = logits - presence - sampling.frequency_penalty * self._counts
        return logits


def _kept(probs: Tensor, sampling: Sampling) -> Tensor:
    """`probs` ([V]) with those tokens at 0 that top-k, top-p and min-p leave out; at least the likeliest stays."""
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.max(), 0.0)
    if sampling.top_k or sampling.top_p < 1:
        values, order = probs.sort(descending=True, stable=True)
        if sampling.top_k:
            values[sampling.top_k :] = 0.0
        before = values.cumsum(-1) - values
        values[1:].masked_fill_(before[1:] >= sampling.top_p * values.sum(), 0.0)
        probs = torch.zeros_like(probs).scatter_(0, order, values)
    return probs


def logprobs_of(logits: Tensor, token: int, top: int) -> tuple[TokenLogprob, list[TokenLogprob]]:
    """The log-probability of `token` under `logits` ([V]), and the `top` likeliest tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    likeliest = [TokenLogprob(t, v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
    return TokenLogprob(token, float(logprobs[token])), likeliest
