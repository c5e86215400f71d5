"""Rule-based tasks with human-written instructions, and the small language model that GLIDER is measured on.

The tasks are those of *Instruction Induction* (arXiv 2205.10782) that a model of a million parameters can learn. A
question is one of a task's instructions and an input; an input is held out by a hash of its text, for all tasks alike.

The base learns the pocket fleet's lessons (copying, spelling, counting) and sees a little of all ten tasks, so that it
follows instructions badly, and not at all never: an adapter leaves it much room, and a task for which there is no
adapter is not hopeless. Six tasks get a LoRA each; of the other four no adapter ever sees a question.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from training.errors import TrainJobError
from training.pocket.curriculum import lesson
from training.pocket.model import FullMasters, LoraMasters, load_model, new_model, save_adapter, save_model
from training.pocket.questions import Split
from training.pocket.tokens import build_tokenizer
from training.pocket.train import Checkpoint, Pairs, Recipe, run_loop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_IN = (
    "letters_list",
    "first_word_letter",
    "singular_to_plural",
    "negation",
    "active_to_passive",
    "taxonomy_animal",
)
HELD_OUT = ("second_word_letter", "antonyms", "sum", "diff")
SHAPE = {"hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
BASE = Recipe(steps=600, examples=80, lr=3e-3, lessons=0.5, checkpoint_every=50)
RANK = 8
ADAPTER = Recipe(steps=100, examples=40, lr=2e-3, warmup=15, weight_decay=0.0, checkpoint_every=25)
MULTI_TASK = replace(ADAPTER, steps=ADAPTER.steps * len(HELD_IN), checkpoint_every=100)
_RARE = 8  # words of the train inputs that are no rarer are tokens of their own
_MOST_LETTERS = 64  # of an input


@dataclass(frozen=True)
class RuleTask:
    """A task: its instructions as people wrote them, and (input, answer) pairs of both splits."""

    name: str
    instructions: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]

    def ask(self, rng: Random, split: Split) -> tuple[str, str]:
        """A question, an instruction and an input, with its answer."""
        text, answer = rng.choice(self.train if split == "train" else self.held_out)
        return f"{rng.choice(self.instructions)}\n{text}", answer

    def sample(self, seed: int, count: int, split: Split) -> list[tuple[str, str]]:
        """Different questions with their answers, the same for the same seed."""
        rng = Random(f"{self.name}:{split}:{seed}")
        pairs = list(self.train if split == "train" else self.held_out)
        rng.shuffle(pairs)
        return [(f"{rng.choice(self.instructions)}\n{text}", answer) for text, answer in pairs[:count]]


def data_folder() -> Path:
    """Where the tasks' files lie: `instructions` in `ROUTER_DATA_DIR`, by default ../shared/data."""
    return Path(os.environ.get("ROUTER_DATA_DIR") or "../shared/data") / "instructions"


def read_tasks(names: Sequence[str] = (*HELD_IN, *HELD_OUT)) -> dict[str, RuleTask]:
    """The tasks by name. Raises `TrainJobError`."""
    return {name: _read_task(name) for name in names}


def _read_task(name: str) -> RuleTask:
    try:
        examples, told = (
            json.loads(gzip.decompress((data_folder() / f"{name}{kind}.json.gz").read_bytes()))
            for kind in ("", ".instructions")
        )
    except (OSError, ValueError) as error:
        message = f"task {name!r} cannot be read: {error}; ROUTER_DATA_DIR names the folder of the data"
        raise TrainJobError(message) from error
    rows = [(row["input"].strip(), row["output"].strip()) for row in examples["examples"].values()]
    rows = [row for row in dict(rows).items() if len(row[0]) <= _MOST_LETTERS]
    instructions = tuple(sorted({text.strip() for text in told["annotations"]}))
    train, held_out = (tuple(row for row in rows if is_held_out(row[0]) is out) for out in (False, True))
    return RuleTask(name, instructions, train, held_out)


def is_held_out(text: str) -> bool:
    """Whether an input is for measuring alone: one of five."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def rule_tokenizer(tasks: Mapping[str, RuleTask]) -> PreTrainedTokenizerFast:
    """Bytes, the instructions' words, and the words that are common in the train inputs."""
    told = Counter(word for task in tasks.values() for text in task.instructions for word in _words(text))
    common = Counter(word for task in tasks.values() for text, _ in task.train for word in _words(text))
    words = {*told, *(word for word, count in common.items() if count >= _RARE)}
    return build_tokenizer(whole=sorted(words))


def _words(text: str) -> list[str]:
    """Words after a space, and capitalised ones at the start, which are never a bare input to be spelled."""
    return re.findall(r" [A-Za-z]{2,}|^[A-Z][a-z]+", text)


def draw_pairs(tasks: Sequence[RuleTask], recipe: Recipe, name: str, seed: int, step: int) -> Pairs:
    """The questions of a training step, uniform over the tasks but for the recipe's share of lessons."""
    rng = Random(f"{name}:{seed}:{step}")
    return [
        lesson(rng) if rng.random() < recipe.lessons else rng.choice(tasks).ask(rng, "train")
        for _ in range(recipe.examples)
    ]


def train_base(folder: Path, work: Path, *, seed: int = 0, recipe: Recipe = BASE) -> None:
    """Train the base into `folder`, unless it is there; a killed run goes on from its checkpoint in `work`."""
    if (folder / "config.json").exists():
        return
    tasks = read_tasks()
    tokenizer = rule_tokenizer(tasks)
    model = new_model(SHAPE, tokenizer, seed)
    draw = partial(draw_pairs, list(tasks.values()), recipe, "base", seed)
    run_loop("rules-base", recipe, draw, model, tokenizer, FullMasters(model), Checkpoint(work / "base.safetensors"))
    save_model(model, tokenizer, folder)


def train_adapter(
    base: Path, names: Sequence[str], folder: Path, work: Path, *, seed: int, rank: int = RANK, recipe: Recipe = ADAPTER
) -> None:
    """Train one LoRA on the tasks `names` into `folder`, unless it is there."""
    from transformers import AutoTokenizer

    if (folder / "adapter_model.safetensors").exists():
        return
    tasks = list(read_tasks(names).values())
    model = load_model(base).train()
    masters = LoraMasters(model, seed, rank)
    label = "+".join(names)
    draw = partial(draw_pairs, tasks, recipe, label, seed)
    checkpoint = Checkpoint(work / f"{folder.name}.safetensors")
    run_loop(f"rules-{label}", recipe, draw, model, AutoTokenizer.from_pretrained(base), masters, checkpoint)
    save_adapter(masters, folder)
