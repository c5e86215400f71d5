"""Trains Router-R1's pocket policy on demonstrations: the warm start before reinforcement (``training.router_r1``).

It begins with the base's weights, which can copy and spell, and learns a few tokens more: the protocol's tags and the
words of cards. A fleet's cards are most of a prompt, so several conversations share one reading of them: a *sheet* is
the cards once and the conversations behind them, each of which sees the cards and itself alone.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from routers.strategies.router_r1.protocol import TAGS, Message
from training.pocket.fleet import BASE, POLICY
from training.pocket.model import COMPUTE, FullMasters, load_model, save_model
from training.pocket.planner import Fleet, demonstration, skill_words
from training.pocket.tokens import ASSISTANT, END, SYSTEM, USER, build_tokenizer, whole_words
from training.pocket.train import Checkpoint, Recipe, lr_factor, make_optimizers, track_steps

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RECIPE = Recipe(steps=1500, examples=32, lr=3e-3, warmup=30, weight_decay=0.05, checkpoint_every=50)
_BRANCHES = 16
_LOG_EVERY = 25
_ATTENTION = "pocket_sheet"


def policy_tokenizer() -> "PreTrainedTokenizerFast":
    """The pocket tokenizer, with the protocol's tags and the words of cards and thoughts after its own tokens."""
    known = set(whole_words())
    words = {word for text in skill_words() for word in re.findall(r"[A-Za-z]+", text) if len(word) > 1}
    forms = {form for word in words for form in (word, f" {word}")} - known
    return build_tokenizer(sorted(forms), [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")])


def new_policy(base: Path, seed: int) -> "LlamaForCausalLM":
    """The base's weights in float32, with fresh rows for the tokens that only the policy has."""
    model = load_model(base)
    size = model.config.vocab_size
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(policy_tokenizer()), mean_resizing=False)
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight[size:], std=0.02)
    return model.train()


@dataclass(frozen=True)
class Sheet:
    """Cards and the conversations that share them.

    Attributes:
        ids: Token ids ``[1, T]``: the cards, then one conversation after the other.
        positions: Of each token in its own conversation, ``[1, T]``.
        spoken: Which tokens are the policy's own, bool ``[1, T]``.
        prefix: How many tokens the cards are.
        filled: Which places of ``[K, L]`` the tokens of K conversations take, in order; L is the longest.
    """

    ids: Tensor
    positions: Tensor
    spoken: Tensor
    prefix: int
    filled: Tensor


def draw_sheet(tokenizer: "PreTrainedTokenizerFast", rng: Random) -> Sheet:
    """Random demonstrations for a random fleet."""
    fleet = Fleet(rng)
    conversations = [demonstration(rng, fleet) for _ in range(_BRANCHES)]
    cards = tokenizer(f"{SYSTEM}{conversations[0][0]['content']}", add_special_tokens=False)["input_ids"]
    rows = [_encode(tokenizer, conversation[1:]) for conversation in conversations]
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    ids = [*cards, *(token for tokens, _ in rows for token in tokens)]
    positions = [*range(len(cards)), *(len(cards) + place for tokens, _ in rows for place in range(len(tokens)))]
    spoken = [False] * len(cards) + [own for _, owns in rows for own in owns]
    return Sheet(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        spoken=torch.tensor([spoken]),
        prefix=len(cards),
        filled=torch.arange(int(lengths.max())) < lengths[:, None],
    )


def _encode(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which are the policy's own words, the end of a turn included."""
    ids: list[int] = []
    own: list[bool] = []
    for message in messages:
        says = message["role"] == "assistant"
        text = f"{message['content']}{END}" if says else f"{USER}{message['content']}{ASSISTANT}"
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        own += [says] * len(tokens)
    return ids, own


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    prefix: int,
    filled: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of a sheet, ``[1, heads, T, d]``: conversations see the cards and their own past."""
    cards = functional.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
    )
    q, k, v = (_apart(x[0, :, prefix:], filled) for x in (query, key, value))
    past = torch.ones(filled.shape[1], filled.shape[1], dtype=torch.bool).tril()
    near = (q @ k.transpose(2, 3)).masked_fill(~past, float("-inf")).transpose(1, 2)[filled].transpose(0, 1)
    far = query[0, :, prefix:] @ key[0, :, :prefix].transpose(1, 2)
    weights = torch.cat([far, near], 2).mul(query.shape[-1] ** -0.5).softmax(2)
    to_own = _apart(weights[:, :, prefix:], filled) @ v
    own = weights[:, :, :prefix] @ value[0, :, :prefix] + to_own.transpose(1, 2)[filled].transpose(0, 1)
    return torch.cat([cards[0], own], 1).transpose(0, 1)[None].contiguous(), None


def _apart(x: Tensor, filled: Tensor) -> Tensor:
    """``[heads, tokens, d]`` to ``[K, heads, L, d]``, zeros where no token is."""
    places = x.new_zeros(*filled.shape, x.shape[0], x.shape[2])
    places[filled] = x.transpose(0, 1)
    return places.transpose(1, 2)


def sheet_loss(model: "LlamaForCausalLM", sheet: Sheet) -> Tensor:
    """Summed cross-entropy of the policy's own tokens."""
    hidden = model.model(
        input_ids=sheet.ids, position_ids=sheet.positions, use_cache=False, prefix=sheet.prefix, filled=sheet.filled
    ).last_hidden_state[:, :-1][sheet.spoken[:, 1:]]
    told = sheet.ids[:, 1:][sheet.spoken[:, 1:]]
    return functional.cross_entropy(model.lm_head(hidden).float(), told, reduction="sum")


def use_sheets(model: "LlamaForCausalLM") -> None:
    """Makes the model read sheets."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)


def train_policy(folder: Path, work: Path, seed: int = 0, recipe: Recipe = RECIPE, stop_at: int | None = None) -> float:
    """Trains the policy on demonstrations and writes it under ``folder``; returns the last loss per token, in nats.

    Args:
        folder: The fleet's folder, where the base is.
        work: Where checkpoints are kept.
        stop_at: Stop after this step, with a checkpoint to go on from.
    """
    tokenizer, model = policy_tokenizer(), new_policy(folder / BASE, seed).to(COMPUTE)
    use_sheets(model)
    masters, checkpoint = FullMasters(model), Checkpoint(work / f"{POLICY}.safetensors")
    optimizers = make_optimizers(masters, recipe)
    first, last = checkpoint.load(masters, optimizers), recipe.steps if stop_at is None else stop_at
    masters.write(model)
    loss, tokens, started = float("nan"), 0, time.monotonic()
    for step in track_steps(POLICY, first, last):
        rng = Random(f"{POLICY}:{seed}:{step}")
        sheets = [draw_sheet(tokenizer, rng) for _ in range(recipe.examples // _BRANCHES)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(step, recipe)
        loss = _step(model, masters, optimizers, sheets)
        tokens += sum(sheet.ids.numel() for sheet in sheets)
        if (step + 1) % _LOG_EVERY == 0:
            speed = tokens / (time.monotonic() - started)
            logger.info("%s step %d/%d loss %.4f, %.0f tokens/s", POLICY, step + 1, recipe.steps, loss, speed)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == last:
            checkpoint.save(step + 1, masters, optimizers)
    if stop_at is None:
        save_model(model, tokenizer, folder / POLICY)
    return loss


def _step(
    model: "LlamaForCausalLM", masters: FullMasters, optimizers: list[torch.optim.Optimizer], sheets: list[Sheet]
) -> float:
    count = sum(int(sheet.spoken.sum()) for sheet in sheets)
    total = 0.0
    for sheet in sheets:
        loss = sheet_loss(model, sheet) / count
        torch.autograd.backward(loss)
        total += loss.item()
    masters.read_gradients(model)
    torch.nn.utils.clip_grad_norm_(masters.parameters.values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    masters.write(model)
    return total
