"""Keys and values of the answers in the making, each in a slot of its own: nothing moves while they grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from experts.local.attention import with_lengths

_FIRST_SLOTS = 4
_UNTOUCHED_TOKENS = 2**16
"""So many are reserved at once where what is never written takes no memory: enlarging copies, and all wait for that."""


class SlotCache(Cache):  # type: ignore[misc]
    """A cache of slots with room for `length` tokens each, for models whose layers all have plain attention.

    A step adds one token to each of the first slots: `begin_step` says where and how many, then the model's layers
    call `update`. Slots are allocated as they are needed, up to `most`.
    """

    def __init__(self, layers: int, *, most: int, length: int, device: torch.device) -> None:
        super().__init__(layers=[_SlotLayer(length) for _ in range(layers)])
        self.length = length
        self.slots = 0
        self._most = most
        self._device = device

    def begin_step(self, rows: int, lengths: Tensor, longest: int) -> None:
        """The coming tokens go to place `lengths` [rows] of the first `rows` slots, the furthest to `longest`."""
        places = torch.arange(rows, device=self._device) * self.length + lengths
        seen = lengths + 1
        for layer in self.layers:
            layer.begin_step(rows, places, seen, longest + 1)

    def reserve(self, slots: int, used: int) -> None:
        """Have at least so many slots, of which as yet no more than the first `used` tokens are in use."""
        if slots > self.slots:
            free = self._device.type == "cpu" and self._most * self.length <= _UNTOUCHED_TOKENS
            more = self._most if free else min(self._most, max(slots, 2 * self.slots, _FIRST_SLOTS))
            for layer in self.layers:
                layer.resize(more, used)
            self.slots = more

    def read_in(self, slot: int, prompt: DynamicCache, row: int, tokens: int) -> None:
        """Copy the last `tokens` tokens of a row of another cache."""
        for layer, other in zip(self.layers, prompt.layers, strict=True):
            layer.write(slot, self.slots, other.keys[row, :, -tokens:], other.values[row, :, -tokens:])

    def take_over(self, slot: int, other: SlotCache, other_slot: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a slot of another cache, or of this one."""
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            keys, values = (side[other_slot, :tokens].transpose(0, 1) for side in (theirs.keys, theirs.values))
            layer.write(slot, self.slots, keys, values)

    def clean(self, slot: int) -> None:
        """Zero a slot: what is not finite would be seen through a mask."""
        for layer in self.layers:
            layer.keys[slot] = 0
            layer.values[slot] = 0


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: `keys` and `values` [slots, length, heads, d]."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._length = length
        self._rows = self._seen = 0
        self._places: Tensor | None = None
        self._lengths = torch.zeros(0, dtype=torch.long)

    def begin_step(self, rows: int, places: Tensor, lengths: Tensor, seen: int) -> None:
        self._rows, self._places, self._lengths, self._seen = rows, places, lengths, seen

    def resize(self, slots: int, used: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _enlarged(self.keys, slots, used), _enlarged(self.values, slots, used)

    def write(self, slot: int, slots: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [heads, tokens, d] into a slot."""
        if self.keys is None or self.values is None:
            self.keys = _zeros(keys, slots, self._length, keys.shape[0], keys.shape[2])
            self.values = _zeros(values, slots, self._length, values.shape[0], values.shape[2])
        self.keys[slot, : keys.shape[1]] = keys.transpose(0, 1)
        self.values[slot, : values.shape[1]] = values.transpose(0, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [rows, heads, 1, d]; gives all keys and values so far, [rows, heads, tokens, d]."""
        keys, values = self._add(self.keys, key_states), self._add(self.values, value_states)
        return with_lengths(keys, self._lengths), values

    def _add(self, held: Tensor | None, states: Tensor) -> Tensor:
        if held is None or self._places is None:
            raise RuntimeError("no prompt was read into this cache")
        held.view(-1, *held.shape[2:]).index_copy_(0, self._places, states[:, :, 0])
        return held[: self._rows, : self._seen].transpose(1, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first prompt that is read in says what is needed."""

    def get_seq_length(self) -> int:
        return self._seen - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen, 0

    def get_max_length(self) -> int:
        return self._length


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of that dtype and device. On a CPU, what is never written takes no memory, unlike torch's own zeros."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    buffer = np.zeros(math.prod(shape) * like.element_size(), np.uint8)
    return torch.from_numpy(buffer).view(like.dtype).view(shape)


def _enlarged(side: Tensor, slots: int, used: int) -> Tensor:
    larger = _zeros(side, slots, *side.shape[1:])
    larger[: side.shape[0], :used] = side[:, :used]
    return larger


def left_padding(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prompts as tokens [P, T] padded on the left, their positions, and which places count, None where all do."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens, torch.arange(longest, device=device).expand(len(prompts), -1), None
    skipped = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
    places = torch.arange(longest, device=device)
    return tokens, (places - skipped).clamp(min=0), places >= skipped
