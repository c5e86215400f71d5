"""Sequences that step together, one token each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from experts.local.model import LocalModel
from experts.local.row import Row

PREFILL_CHUNK = 512
"""Prompt tokens that are read at once, so that those who already read their answer wait no longer than for these."""


class Prefill:
    """A prompt that is being read, for one or more rows that continue it."""

    def __init__(self, model: LocalModel, prompt: Sequence[int], rows: list[Row]) -> None:
        self.rows = rows
        self._model = model
        self._prompt = torch.tensor([prompt], device=model.device)
        self._cache = model.new_cache()
        self._read = 0
        self._chunk = PREFILL_CHUNK if model.mergeable else len(prompt)

    @property
    def next_tokens(self) -> int:
        """How many tokens the next step reads."""
        return min(self._chunk, self._prompt.shape[1] - self._read)

    def step(self) -> Batch | None:
        """Read one chunk; after the last one, the batch of the rows with their first token."""
        tokens = self._prompt[:, self._read : self._read + self.next_tokens]
        positions = torch.arange(self._read, self._read + tokens.shape[1], device=tokens.device)[None]
        logits = self._model.forward(tokens, positions, None, self._cache, [self.rows[0].job.adapter])
        self._read += tokens.shape[1]
        if self._read < self._prompt.shape[1]:
            return None
        batch = Batch(self._model, self.rows, self._cache, self._read)
        if len(self.rows) > 1:
            batch.repeat(len(self.rows))
        batch.choose(logits.expand(len(self.rows), -1))
        return batch


class Batch:
    """Rows with a key-value cache [B, heads, L, d] each layer, padded on the left to the longest row."""

    def __init__(self, model: LocalModel, rows: list[Row], cache: DynamicCache, length: int) -> None:
        self.rows = rows
        self._model = model
        self._cache = cache
        self._lengths = torch.tensor([length], device=model.device)
        self._longest = length
        self._padded = False

    def repeat(self, n: int) -> None:
        """Make `n` rows of the only one."""
        self._select(torch.zeros(n, dtype=torch.long, device=self._model.device))

    def step(self) -> None:
        """One token more for each row."""
        tokens = torch.tensor([[row.last_token] for row in self.rows], device=self._model.device)
        positions = self._lengths[:, None]
        self._lengths = self._lengths + 1
        self._longest += 1
        adapters = [row.job.adapter for row in self.rows]
        self.choose(self._model.forward(tokens, positions, self._mask(), self._cache, adapters))

    def choose(self, logits: Tensor) -> None:
        """Choose each row's next token by `logits` [B, V]."""
        peaks, tokens = logits.max(-1)
        on_cpu = logits.float().cpu() if any(row.wants_logits for row in self.rows) else None
        for i, (row, peak, token) in enumerate(zip(self.rows, peaks.tolist(), tokens.tolist(), strict=True)):
            if not math.isfinite(peak):
                row.fail()
            else:
                row.accept(row.choose(on_cpu[i]) if on_cpu is not None and row.wants_logits else token)

    def drop_ended(self) -> None:
        """Drop the rows that are finished or that nobody waits for."""
        kept = [i for i, row in enumerate(self.rows) if not (row.finished or row.job.cancelled)]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if kept:
            self._select(torch.tensor(kept, device=self._model.device))

    def merge(self, other: Batch) -> None:
        """Take over the rows of `other`."""
        longest = max(self._longest, other._longest)
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            mine.keys = torch.cat([_lengthened(mine.keys, longest), _lengthened(theirs.keys, longest)])
            mine.values = torch.cat([_lengthened(mine.values, longest), _lengthened(theirs.values, longest)])
        self.rows = self.rows + other.rows
        self._lengths = torch.cat([self._lengths, other._lengths])
        self._longest = longest
        self._padded = bool((self._lengths != longest).any())

    def _select(self, index: Tensor) -> None:
        """Keep the rows at `index`, and no more padding than they need."""
        self._lengths = self._lengths[index]
        self._longest = int(self._lengths.max())
        self._padded = bool((self._lengths != self._longest).any())
        for layer in self._cache.layers:
            layer.keys = layer.keys[index, :, -self._longest :]
            layer.values = layer.values[index, :, -self._longest :]

    def _mask(self) -> Tensor | None:
        """Which places of the cache count, [B, L]; None where all do."""
        if not self._padded:
            return None
        places = torch.arange(self._longest, device=self._model.device)
        return places >= (self._longest - self._lengths)[:, None]


def _lengthened(states: Tensor, longest: int) -> Tensor:
    return pad(states, (0, 0, longest - states.shape[2], 0))
