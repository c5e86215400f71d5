"""Prompts that are read together, and answers that grow together, one token a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from experts.errors import ExpertError, ExpertUnavailableError
from experts.local.cache import SlotCache, left_padding
from experts.local.mixture import Mixture, plan_for
from experts.local.model import LocalModel
from experts.local.row import Job, Piece, Row
from experts.local.sampling import BatchSampler, TokenLogprob, logprobs_of
from experts.local.sites import Plan

PREFILL_CHUNK = 512
"""Prompt tokens that are read at once, so that those who already read their answer wait no longer than for these."""

_LENGTHS = (256, 1024, 4096, 16384, 65536, 262144)
"""Answers step together with others up to the same of these lengths: a short one does not pay for a long one."""

_SOON = 64
_MOVES = 1
"""So many answers that will need a longer place within so many tokens get it in a turn."""

_SAME = 0.03
"""Relative difference of logits that rounding explains, in half precision."""

Reply = Callable[[Job, Piece | ExpertError], None]


class Prompt:
    """A prompt that is being read, for one or more rows that continue it."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.tokens = rows[0].prompt
        self.read = 0
        self.cache: DynamicCache | None = None

    @property
    def mixture(self) -> Mixture:
        return self.rows[0].job.mixture

    @property
    def cancelled(self) -> bool:
        return self.rows[0].job.cancelled


class Ready:
    """A prompt that is read: a row of a cache, whose last `tokens` places are its own, and each row's first token."""

    def __init__(self, rows: list[Row], first: Sequence[int], cache: DynamicCache, row: int, tokens: int) -> None:
        self.rows, self.first = rows, first
        self.cache, self.row, self.tokens = cache, row, tokens


def read_piece(model: LocalModel, prompt: Prompt, chunk: int, reply: Reply) -> Ready | None:
    """Read one piece of a prompt; after the last one, it is ready."""
    piece = prompt.tokens[prompt.read : prompt.read + chunk]
    prompt.cache = prompt.cache or model.new_cache()
    tokens = torch.tensor([piece], device=model.device)
    positions = torch.arange(prompt.read, prompt.read + len(piece), device=model.device)[None]
    plan = plan_for([prompt.mixture], len(piece), model.pool, model.device)
    logits = model.forward(tokens, positions, None, prompt.cache, plan)
    prompt.read += len(piece)
    if prompt.read < len(prompt.tokens):
        return None
    first = _choose(prompt.rows, logits.expand(len(prompt.rows), -1).float().contiguous(), model.device, reply)
    return Ready(prompt.rows, first.tolist(), prompt.cache, 0, prompt.read)


def read_together(model: LocalModel, prompts: Sequence[Prompt], reply: Reply) -> list[Ready]:
    """Read whole prompts in one pass, padded on the left."""
    if len(prompts) == 1:
        return [ready] if (ready := read_piece(model, prompts[0], len(prompts[0].tokens), reply)) else []
    tokens, positions, mask = left_padding([prompt.tokens for prompt in prompts], model.device)
    cache = model.new_cache()
    mixtures, own = [prompt.mixture for prompt in prompts], [len(prompt.tokens) for prompt in prompts]
    plan = plan_for(mixtures, tokens.shape[1], model.pool, model.device, own)
    logits = model.forward(tokens, positions, mask, cache, plan).float()
    rows = [row for prompt in prompts for row in prompt.rows]
    owners = torch.tensor([i for i, prompt in enumerate(prompts) for _ in prompt.rows], device=model.device)
    first = iter(_choose(rows, logits[owners], model.device, reply).tolist())
    return [
        Ready(prompt.rows, [next(first) for _ in prompt.rows], cache, i, len(prompt.tokens))
        for i, prompt in enumerate(prompts)
    ]


def _choose(
    rows: Sequence[Row], logits: Tensor, device: torch.device, reply: Reply, sampler: BatchSampler | None = None
) -> Tensor:
    """Choose each row's next token by `logits` [B, V] float32, and tell those who wait for it."""
    finite = logits.isfinite().all(-1)
    bad: set[int] = set()
    if not bool(finite.all()):
        bad = set((~finite).nonzero()[:, 0].tolist())
        logits = torch.where(finite[:, None], logits, 0)
    telling = [i for i, row in enumerate(rows) if row.top_logprobs is not None]
    raw = logits[telling] if telling else logits
    tokens = (sampler or BatchSampler([row.sampler for row in rows], device)).choose(logits)
    chosen = tokens.tolist()
    logprobs: dict[int, tuple[TokenLogprob, list[TokenLogprob]]] = {}
    if telling:
        tops = [rows[i].top_logprobs or 0 for i in telling]
        logprobs = dict(zip(telling, logprobs_of(raw, [chosen[i] for i in telling], tops), strict=True))
    for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
        if i in bad:
            row.finished = row.broken = row.job.cancelled = True
            reply(row.job, ExpertUnavailableError("the model gave numbers that are not finite"))
        elif (piece := row.accept(token, logprobs.get(i))) is not None:
            reply(row.job, piece)
    return tokens


class Steps(Protocol):
    """Answers that grow together."""

    rows: list[Row]

    def step(self) -> None:
        """One token more for each row."""
        ...

    def drop_ended(self) -> list[Row]:
        """Drop the rows that are finished or that nobody waits for, and say which."""
        ...


class Batch:
    """Answers of up to `length` tokens, each in a slot of one cache: row i in slot i."""

    def __init__(self, model: LocalModel, reply: Reply, *, most: int, length: int) -> None:
        self.rows: list[Row] = []
        self.length = length
        self._model, self._reply = model, reply
        self._cache = SlotCache(model.layers, most=most, length=length, device=model.device)
        self._ends: list[int] = []  # tokens of each row that are in the cache
        self._tokens = torch.zeros(most, dtype=torch.long, device=model.device)
        self._lengths = torch.zeros(most, dtype=torch.long, device=model.device)
        self._mask: Tensor | None = None
        self._sampler: BatchSampler | None = None
        self._plan = Plan()
        self._changed = True

    @property
    def used(self) -> int:
        """Tokens in the cache."""
        return sum(self._ends)

    @property
    def allocated(self) -> int:
        """Tokens that the cache has memory for."""
        return self._cache.slots * self.length

    def join(self, row: Row, first: int, ready: Ready) -> None:
        """Take a row whose prompt was read."""
        slot = self._new_slot()
        self._cache.read_in(slot, ready.cache, ready.row, ready.tokens)
        self._add(row, first, ready.tokens)

    def pull(self, other: Batch, i: int) -> None:
        """Take row `i` of another batch, which drops it later."""
        slot = self._new_slot()
        self._cache.take_over(slot, other._cache, i, other._ends[i])
        self._add(other.rows[i], int(other._tokens[i]), other._ends[i])

    def outgrown(self) -> list[int]:
        """The rows that have no place for another token, and a few that soon will have none.

        Rows that began together would have to go together, and all answers would wait for it.
        """
        outgrown = [i for i, end in enumerate(self._ends) if end >= self.length]
        if self.length == self._model.longest:
            return outgrown
        soon = [i for i, end in enumerate(self._ends) if self.length - _SOON <= end < self.length]
        return sorted(outgrown + soon[: max(0, _MOVES - len(outgrown))])

    def step(self) -> None:
        """One token more for each row."""
        n, longest = len(self.rows), max(self._ends)
        if self._changed:
            self._changed = False
            self._plan = plan_for([row.job.mixture for row in self.rows], 1, self._model.pool, self._model.device)
            self._sampler = BatchSampler([row.sampler for row in self.rows], self._model.device)
            self._mask = self._new_mask()
        lengths = self._lengths[:n]
        self._cache.begin_step(n, lengths, longest)
        mask = self._mask
        if mask is not None:
            mask.scatter_(1, lengths[:, None], 0)
            mask = mask[:, None, None, : longest + 1]
        logits = self._model.forward(self._tokens[:n, None], lengths[:, None], mask, self._cache, self._plan)
        self._ends = [end + 1 for end in self._ends]
        lengths += 1
        self._tokens[:n] = _choose(self.rows, logits.float(), self._model.device, self._reply, self._sampler)

    def drop_ended(self) -> list[Row]:
        """Drop the rows that are finished or that nobody waits for, and say which."""
        return self.drop([i for i, row in enumerate(self.rows) if row.finished or row.job.cancelled])

    def drop(self, places: Sequence[int]) -> list[Row]:
        """Drop rows: the last ones move into their slots."""
        dropped = []
        for i in sorted(places, reverse=True):
            last = len(self.rows) - 1
            dropped.append(self.rows[i])
            if self.rows[i].broken:
                self._cache.clean(i)
            if i != last:
                self._cache.take_over(i, self._cache, last, self._ends[last])
                self.rows[i], self._ends[i] = self.rows[last], self._ends[last]
                self._tokens[i], self._lengths[i] = self._tokens[last], self._lengths[last]
            self.rows.pop()
            self._ends.pop()
            self._changed = True
        return dropped

    def _new_slot(self) -> int:
        """A slot for another row; that is added once its keys and values are there, for which memory may lack."""
        self._cache.reserve(len(self.rows) + 1, max(self._ends, default=0))
        return len(self.rows)

    def _add(self, row: Row, first: int, tokens: int) -> None:
        slot = len(self.rows)
        self._tokens[slot], self._lengths[slot] = first, tokens
        self.rows.append(row)
        self._ends.append(tokens)
        self._changed = True

    def _new_mask(self) -> Tensor | None:
        """What is added to attention's scores [rows, length]: 0 for a row's tokens, the least number elsewhere.

        None where all rows are of the same length, and will stay so.
        """
        if len(set(self._ends)) == 1:
            return None
        places = torch.arange(self.length, device=self._model.device)
        least = torch.finfo(self._model.dtype).min
        return torch.where(places < self._lengths[: len(self.rows), None], 0.0, least).to(self._model.dtype)


class Alone:
    """One answer with a cache of its own, for models whose caches cannot be laid side by side."""

    def __init__(self, model: LocalModel, reply: Reply, row: Row, ready: Ready) -> None:
        self.rows = [row]
        self._model, self._reply = model, reply
        self._cache, self._length = ready.cache, ready.tokens
        self._token = ready.first[0]
        self._plan = plan_for([row.job.mixture], 1, model.pool, model.device)
        self._sampler = BatchSampler([row.sampler], model.device)

    def step(self) -> None:
        """One token more."""
        device = self._model.device
        token, position = (torch.tensor([[value]], device=device) for value in (self._token, self._length))
        logits = self._model.forward(token, position, None, self._cache, self._plan)
        self._length += 1
        self._token = int(_choose(self.rows, logits.float(), device, self._reply, self._sampler)[0])

    def drop_ended(self) -> list[Row]:
        """Drop the row if it is finished or nobody waits for it, and say so."""
        ended = [row for row in self.rows if row.finished or row.job.cancelled]
        self.rows = [row for row in self.rows if row not in ended]
        return ended


def length_class(tokens: int, context: int) -> int:
    """The length of the batch for an answer that has `tokens` tokens, of at most `context`."""
    return min(next((length for length in _LENGTHS if length > tokens), context), context)


@torch.inference_mode()
def first_pass(model: LocalModel, mixture: Mixture) -> bool:
    """Read a prompt of two tokens and make one more; whether all numbers are finite."""
    if not model.pool.fits(mixture.adapters):
        raise ValueError("its adapters find no room")
    model.pool.acquire(mixture.adapters)
    cache, device = model.new_cache(), model.device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    positions = torch.arange(3, device=device)[None]
    model.forward(tokens, positions[:, :2], None, cache, plan_for([mixture], 2, model.pool, device))
    logits = model.forward(tokens[:, :1], positions[:, 2:], None, cache, plan_for([mixture], 1, model.pool, device))
    model.pool.release(mixture.adapters)
    return bool(logits.isfinite().all())


@torch.inference_mode()
def can_share(model: LocalModel) -> bool:
    """Whether answers of different lengths can lie side by side in one cache, as they would alone.

    It is tried: not every model with plain attention understands the mask, and some count positions their own way.
    """
    device = model.device
    prompts = [[0], [0, 0, 0, 0]]
    together = SlotCache(model.layers, most=2, length=8, device=device)
    together.reserve(2, 0)
    alone = []
    for slot, prompt in enumerate(prompts):
        cache, tokens = model.new_cache(), torch.tensor([prompt], device=device)
        model.forward(tokens, torch.arange(len(prompt), device=device)[None], None, cache, Plan())
        together.read_in(slot, cache, 0, len(prompt))
        token, position = (torch.tensor([[value]], device=device) for value in (0, len(prompt)))
        alone.append(model.forward(token, position, None, cache, Plan()))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    together.begin_step(2, lengths, 4)
    counts = torch.arange(5, device=device) <= lengths[:, None]
    mask = torch.where(counts, 0.0, torch.finfo(model.dtype).min).to(model.dtype)[:, None, None]
    tokens = torch.zeros(2, 1, dtype=torch.long, device=device)
    try:
        step = model.forward(tokens, lengths[:, None], mask, together, Plan())
        cache = model.new_cache()
        model.forward(*left_padding(prompts, device), cache, Plan())
        padded = torch.ones(2, 5, dtype=torch.bool, device=device)
        padded[0, :3] = False
        read = model.forward(tokens, lengths[:, None], padded, cache, Plan())
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    expected = torch.cat(alone).float()
    error = max(float((other.float() - expected).abs().max()) for other in (step, read))
    return error <= _SAME * float(expected.abs().max())
