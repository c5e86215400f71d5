"""Trains the pocket fleet: one readable loop for the base, the specialists and the generalist.

Every batch is drawn from a seed and the step's number, so a run that resumes from a checkpoint sees what it would
have seen. Hidden matrices of whole models are trained with Muon (https://kellerjordan.github.io/posts/muon), all else
with AdamW.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.pocket.aggregation import aggregation_lesson
from training.pocket.curriculum import lesson
from training.pocket.fleet import BASE, GENERALIST
from training.pocket.model import (
    COMPUTE,
    SHAPES,
    FullMasters,
    LoraMasters,
    Masters,
    answer_loss,
    load_model,
    new_model,
    save_adapter,
    save_model,
    train_attention,
)
from training.pocket.questions import PocketError
from training.pocket.skills import SKILLS
from training.pocket.tokens import build_tokenizer, encode_pairs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Pairs = list[tuple[str, str]]

_LOG_EVERY = 25
_MICROBATCH_TOKENS = 900


@dataclass(frozen=True)
class Recipe:
    """How one member of the fleet is trained.

    Attributes:
        steps: Optimizer steps.
        examples: Questions per step.
        lr: Peak learning rate, after a linear warm-up and before a linear decay to zero.
        lessons: Share of the questions that come from the base's curriculum rather than from a skill.
        aggregation: Share of the others that ask for the right one among answers of others.
        hard: Tasks that a specialist's base does badly, which half of the specialist's questions are about.
    """

    steps: int
    examples: int = 128
    lr: float = 3e-3
    lessons: float = 0.0
    aggregation: float = 0.0
    hard: tuple[str, ...] = ()
    warmup: int = 40
    weight_decay: float = 0.1
    checkpoint_every: int = 200


def _specialist(steps: int, *hard: str) -> Recipe:
    return Recipe(steps, examples=96, lr=4e-3, hard=hard, warmup=15, weight_decay=0.0, checkpoint_every=50)


RECIPES = {
    BASE: Recipe(steps=800, lessons=0.4),
    GENERALIST: Recipe(steps=800, lr=2e-3, lessons=0.05, aggregation=0.4, checkpoint_every=50),
    "arithmetic": _specialist(900, "add", "subtract"),
    "units": _specialist(120),
    "roman": _specialist(80),
    "sorting": _specialist(400, "ascending", "descending"),
    "text": _specialist(750, "remove", "reverse"),
    "dates": _specialist(840, "later"),
    "data": _specialist(260, "field"),
    "logic": _specialist(200, "order", "order_up", "bits"),
    "ciphers": _specialist(150, "caesar"),
    "elements": _specialist(340, "number"),
    "capitals": _specialist(80),
}


def draw_pairs(name: str, recipe: Recipe, seed: int, step: int) -> Pairs:
    """The (query, answer) pairs of one training step."""
    rng = Random(f"{name}:{seed}:{step}")
    skills = [SKILLS[name]] if name in SKILLS else list(SKILLS.values())

    def draw() -> tuple[str, str]:
        if rng.random() < recipe.lessons:
            return lesson(rng)
        if recipe.aggregation and rng.random() < recipe.aggregation:
            return aggregation_lesson(rng)
        question = rng.choice(skills).ask(rng, "train", recipe.hard if rng.random() < 0.5 else ())
        return question.query, question.answer

    return [draw() for _ in range(recipe.examples)]


def collate(tokenizer: "PreTrainedTokenizerFast", pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded rows of like length: token ids ``[B, T]`` and which are an answer's, bool ``[B, T]``."""
    part: list[tuple[list[int], int]] = []
    for row in sorted(encode_pairs(tokenizer, pairs), key=lambda row: len(row[0])):
        if part and (len(part) + 1) * len(row[0]) > _MICROBATCH_TOKENS:
            yield _pad(part, tokenizer.pad_token_id)
            part = []
        part.append(row)
    yield _pad(part, tokenizer.pad_token_id)


def _pad(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    width = len(rows[-1][0])
    ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in rows])
    places = torch.arange(width)
    spans = torch.tensor([[prompt, len(tokens)] for tokens, prompt in rows])
    return ids, (places >= spans[:, :1]) & (places < spans[:, 1:])


def make_optimizers(masters: Masters, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for a whole model's hidden matrices, AdamW for embeddings, norms and low-rank pairs."""
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, weight in masters.parameters.items():
        (hidden if name.endswith("_proj.weight") else other).append(weight)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            other, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay if not hidden else 0.0
        )
    ]
    if hidden:
        muon = torch.optim.Muon(hidden, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def lr_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a linear decay to zero."""
    return min((step + 1) / recipe.warmup, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup), 1.0)


class Checkpoint:
    """Masters, optimizer state and the next step, in one safetensors file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, masters: Masters, optimizers: list[torch.optim.Optimizer]) -> None:
        tensors = {f"master/{name}": weight.detach() for name, weight in masters.parameters.items()}
        for index, optimizer in enumerate(optimizers):
            for place, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{place}/{key}": torch.as_tensor(value) for key, value in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"step": str(step)}
        )
        partial.replace(self.path)

    def load(self, masters: Masters, optimizers: list[torch.optim.Optimizer]) -> int:
        """Restores everything and returns the step to go on with: 0 where there is no checkpoint."""
        if not self.path.exists():
            return 0
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                kind, _, rest = name.partition("/")
                if kind == "master":
                    masters.parameters[rest].copy_(file.get_tensor(name))
                else:
                    index, place, key = rest.split("/")
                    states[int(index)].setdefault(int(place), {})[key] = file.get_tensor(name)
            step = int(file.metadata()["step"])
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return step


def train_step(
    model: "LlamaForCausalLM",
    masters: Masters,
    optimizers: list[torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor]],
) -> float:
    """One optimizer step; the mean loss per answer token, in nats."""
    count = sum(int(answer.sum()) for _, answer in batches)
    total = 0.0
    for ids, answer in batches:
        loss = answer_loss(model, ids, answer) / count
        torch.autograd.backward(loss)
        total += loss.item()
    masters.read_gradients(model)
    torch.nn.utils.clip_grad_norm_(masters.parameters.values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    masters.write(model)
    return total


def run_loop(
    name: str,
    recipe: Recipe,
    draw: Callable[[int], Pairs],
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    masters: Masters,
    checkpoint: Checkpoint,
    stop_at: int | None = None,
) -> float:
    """Trains from the checkpoint's step to the last, or to ``stop_at``; returns the last loss.

    ``draw`` gives the pairs of a step by its number.
    """
    train_attention(model)
    optimizers = make_optimizers(masters, recipe)
    first = checkpoint.load(masters, optimizers)
    masters.write(model)
    last = recipe.steps if stop_at is None else stop_at
    loss, tokens, started = float("nan"), 0, time.monotonic()
    for step in track_steps(name, first, last):
        batches = list(collate(tokenizer, draw(step)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(step, recipe)
        loss = train_step(model, masters, optimizers, batches)
        tokens += sum(ids.numel() for ids, _ in batches)
        if (step + 1) % _LOG_EVERY == 0:
            speed = tokens / (time.monotonic() - started)
            logger.info("%s step %d/%d loss %.4f, %.0f tokens/s", name, step + 1, recipe.steps, loss, speed)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == last:
            checkpoint.save(step + 1, masters, optimizers)
    return loss


def track_steps(name: str, first: int, last: int) -> Iterator[int]:
    """The steps from first to last, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"pocket-{name}", total=last, completed=first)
        for step in range(first, last):
            yield step
            progress.advance(task)


def train(
    name: str,
    folder: Path,
    work: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    stop_at: int | None = None,
    from_weights: bool = False,
) -> float:
    """Trains one member of the fleet and writes it in its place under ``folder``; returns the last loss.

    Args:
        name: ``base``, ``generalist`` or a skill, whose adapter needs the trained base.
        folder: The fleet's folder.
        work: Where checkpoints are kept.
        stop_at: Stop after this step, with a checkpoint to go on from and nothing written to ``folder``.
        from_weights: Whether a whole model starts from its weights in ``folder`` rather than from fresh ones.
    """
    recipe = recipe or RECIPES[name]
    checkpoint, tokenizer = Checkpoint(work / f"{name}.safetensors"), build_tokenizer()
    draw = partial(draw_pairs, name, recipe, seed)
    if name in SKILLS:
        if not (folder / BASE / "config.json").exists():
            raise PocketError(f"no trained base in {str(folder / BASE)!r}: train 'base' first")
        model = load_model(folder / BASE).to(COMPUTE).train()
        lora = LoraMasters(model, seed)
        loss = run_loop(name, recipe, draw, model, tokenizer, lora, checkpoint, stop_at)
        if stop_at is None:
            save_adapter(lora, folder / "adapters" / name)
        return loss
    model = _restart(folder / name) if from_weights else new_model(SHAPES[name], tokenizer, seed)
    loss = run_loop(name, recipe, draw, model, tokenizer, FullMasters(model), checkpoint, stop_at)
    if stop_at is None:
        save_model(model, tokenizer, folder / name)
    return loss


def _restart(folder: Path) -> "LlamaForCausalLM":
    if not (folder / "config.json").exists():
        raise PocketError(f"no trained model in {str(folder)!r} to go on from")
    return load_model(folder).to(COMPUTE).train()
