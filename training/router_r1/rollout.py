"""Samples whole conversations with the policy in batches: its turns, and the experts' replies between them.

All conversations of a batch go on together, over one key-value cache. In each round every conversation that is under
way samples a turn, token by token, until its closing tag; then all searches are answered at once and the replies are
read in one pass. What one conversation does not need in a round is a hole in its row of the cache, which the mask
leaves out. So nothing is ever read twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experts.cards import ExpertCard
from experts.expert import Usage
from routers.strategies.router_r1.protocol import CLOSING, MAX_CALLS, Message, first_turn, information, parse
from training.router_r1.environment import Replies, Search

_TAIL = 12  # tokens in which a closing tag is looked for


@dataclass(slots=True)
class Episode:
    """One conversation: its tokens and what happened in it.

    Attributes:
        prompt: Token ids up to the policy's first turn.
        completion: Token ids after that: the policy's own and, where `own` is 0, those of the environment.
        logprobs: Of the policy's own tokens; 0 for the others.
        turns: The policy's turns as text.
        searches: Who was asked what, in order, and `replies` what the policy read of it.
        cost: Sum over the calls of output tokens times USD per million output tokens.
        usd: What the calls cost, input included.
        answer: What was answered; None where nothing was.
        broken: Why the format is broken.
    """

    cards: Mapping[str, ExpertCard]
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    cost: float = 0.0
    usd: float = 0.0
    answer: str | None = None
    broken: str | None = None
    done: bool = False

    def add(self, tokens: Sequence[int], *, own: bool, logprobs: Sequence[float] = ()) -> None:
        """Take in the policy's tokens, or the environment's."""
        self.completion += tokens
        self.own += [int(own)] * len(tokens)
        self.logprobs += logprobs if own else [0.0] * len(tokens)

    def end(self, broken: str | None = None) -> None:
        """Nothing more is said."""
        self.done, self.broken = True, broken


class Frame:
    """What a tokenizer's chat template writes around the contents of a conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        said, read = "\ue000said\ue001", "\ue000read\ue001"
        messages = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": read},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, _, rest = text.partition(said)
        between, _, after = rest.partition(read)
        self._between, self._after = self._tokens(between), self._tokens(after)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to the policy's first turn."""
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self._tokens(text)

    def reply(self, content: str) -> list[int]:
        """The tokens from the end of a turn to the beginning of the next, with what is read between them.

        A special token that is spelled out in the content is read as the text that it is.
        """
        return [*self._between, *self._tokens(content, split_special_tokens=True), *self._after]

    def _tokens(self, text: str, **options: bool) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a rollout, in tokens and calls. `temperature` 0 is greedy."""

    completion_tokens: int
    turn_tokens: int = 96
    reply_chars: int = 200
    max_calls: int = MAX_CALLS
    temperature: float = 1.0


@torch.inference_mode()
def roll_out(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[tuple[Sequence[Message], Sequence[ExpertCard]]],
    environment: Replies,
    limits: Limits,
    generator: torch.Generator | None = None,
) -> list[Episode]:
    """One conversation for each opening and its cards, in their order; an opening that comes again is read once."""
    frame = Frame(tokenizer)
    episodes = [Episode({card.name: card for card in cards}, frame.prompt(opening)) for opening, cards in conversations]
    batch = _Batch(model, tokenizer, episodes, limits, generator)
    for calls in range(limits.max_calls + 1):
        batch.take_turns()
        searching = [one for one in episodes if not one.done and _read_turn(one, last=calls == limits.max_calls)]
        if not searching:
            break
        found = environment.replies([one.searches[-1] for one in searching])
        for one, reply in zip(searching, found, strict=True):
            card = one.cards[one.searches[-1].expert]
            one.cost += reply.output_tokens * card.output_price
            one.usd += card.cost(Usage(reply.input_tokens, reply.output_tokens))
            read = information(reply.text, limits.reply_chars, last=calls + 1 == limits.max_calls)
            one.replies.append(reply.text)
            tokens = frame.reply(read)
            if len(one.completion) + len(tokens) + 2 > limits.completion_tokens:
                one.end("it is longer than a completion may be")
            else:
                one.add(tokens, own=False)
        batch.read([one for one in searching if not one.done])
    for one in episodes:
        if not one.broken and len(one.completion) < limits.completion_tokens:
            one.add([tokenizer.eos_token_id], own=False)
    return episodes


def _read_turn(one: Episode, *, last: bool) -> bool:
    """Take in the turn just written; whether it is a search that is to be answered."""
    turn = parse(one.turns[-1], tuple(one.cards))
    if turn.kind == "answer":
        one.answer = turn.text
        one.end()
    elif turn.kind == "broken":
        one.end(turn.text)
    elif last:
        one.end("it asks on when it has to answer")
    elif turn.expert:
        one.searches.append(Search(turn.expert, turn.text))
        return True
    return False


class _Batch:
    """The rows of a batch in one cache: a mask ``[B, T]``, 0 for holes, and the next position of each row."""

    def __init__(
        self, model: Any, tokenizer: Any, episodes: Sequence[Episode], limits: Limits, generator: torch.Generator | None
    ) -> None:
        self._model, self._tokenizer, self._limits, self._generator = model, tokenizer, limits, generator
        self._episodes = list(episodes)
        self._rows = {id(one): row for row, one in enumerate(self._episodes)}
        self._device = next(model.parameters()).device
        unique = list(dict.fromkeys(tuple(one.prompt) for one in self._episodes))
        which = torch.tensor([unique.index(tuple(one.prompt)) for one in self._episodes], device=self._device)
        width = max(map(len, unique))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in unique], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in unique], device=self._device)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self._cache.batch_select_indices(which)
        self._mask, self._places = mask[which], mask.sum(1)[which]
        self._logits = output.logits[which, -1]

    def take_turns(self) -> None:
        """Every row under way writes a turn, up to a closing tag, the end token, or the bound."""
        writing = [one for one in self._episodes if not one.done]
        turns: dict[int, list[int]] = {id(one): [] for one in writing}
        end = self._tokenizer.eos_token_id
        while writing:
            tokens, logprobs = self._sample()
            feed, going = [], []
            for one in writing:
                row = self._rows[id(one)]
                token = int(tokens[row])
                one.add([token], own=True, logprobs=[float(logprobs[row])])
                if token == end:  # its own act too, which the reward is for
                    continue
                turn = turns[id(one)]
                turn.append(token)
                feed.append((row, [token]))
                ended = any(tag in self._text(turn[-_TAIL:]) for tag in CLOSING)
                full = len(one.completion) + 1 >= self._limits.completion_tokens
                if not ended and not full and len(turn) < self._limits.turn_tokens:
                    going.append(one)
            self._feed(feed)
            writing = going
        for one in self._episodes:
            if not one.done:
                one.turns.append(first_turn(self._text(turns[id(one)])))

    def read(self, episodes: Sequence[Episode]) -> None:
        """The rows of `episodes` read what the environment added last."""
        feed = []
        for one in episodes:
            count = len(one.own) - max((i + 1 for i, own in enumerate(one.own) if own), default=0)
            feed.append((self._rows[id(one)], one.completion[len(one.completion) - count :]))
        self._feed(feed)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _sample(self) -> tuple[Tensor, Tensor]:
        """The next token of each row ``[B]`` and its log-probability under the policy."""
        logits = self._logits.float()
        if self._limits.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            chances = (logits / self._limits.temperature).softmax(-1)
            tokens = torch.multinomial(chances, 1, generator=self._generator)[:, 0]
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs

    def _feed(self, feed: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Read tokens, so many for each row that is named; what the others lack are holes."""
        if not feed:
            return
        width, rows = max(len(tokens) for _, tokens in feed), len(self._episodes)
        ids = torch.full((rows, width), self._tokenizer.pad_token_id)
        mask = torch.zeros((rows, width), dtype=self._mask.dtype)
        for row, tokens in feed:
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        self._mask = torch.cat([self._mask, mask], 1)
        positions = (self._places[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        self._places = self._places + mask.sum(1)
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        last = (mask.sum(1) - 1).clamp(min=0)
        fed = mask.any(1)
        logits = output.logits[torch.arange(rows, device=self._device), last]
        self._logits = torch.where(fed[:, None], logits, self._logits)
