"""What GLIDER and its kin are worth: `python -m training.glider.compare`.

Two worlds. `rules`: the ten tasks of `rules.py` on a small model made for them, six of them with an adapter. `pocket`:
the pocket fleet's skills with its shipped adapters, seven of eleven in the mixture. The tasks without an adapter are
held out. The gates are those that `router-service train glider` makes; every method answers the same questions, which
no training saw. A question's task is told to `right adapter` alone, and to the counting of right answers.

A seed decides the gates' training, the examples that the router knows and the questions; base and adapters stay. What
is done lies in the work folder, and the same command goes on from there. It fills the tables of docs/glider.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.mixing import Mixture, RequestMixture, install_mixture, load_mixture, read_adapters
from experts.mixing.post_hoc import glider_bias
from routers.glider import GliderRouter, Guidance
from routers.registry import load_router
from training import metrics
from training.doc_tables import fill_tables, markdown
from training.glider import rules
from training.glider.spec import GateName, GliderSpec, Task, TasksFile
from training.glider.train import train_glider
from training.pocket.fleet import FLEET
from training.pocket.generate import respond
from training.pocket.grading import is_right, sample
from training.pocket.model import RANK, LoraMasters, load_model, save_adapter
from training.pocket.questions import clean_answer
from training.pocket.skills import SKILLS
from training.pocket.tokens import build_tokenizer
from training.pocket.train import Checkpoint, Pairs, Recipe, run_loop
from training.report import interval
from training.results import RESULTS, write

logger = logging.getLogger(__name__)

COMMAND = "python -m training.glider.compare"
DOCUMENT = Path("docs/glider.md")
WORK = Path.home() / ".cache" / "router-service" / "glider"
SEEDS = 3
EXAMPLES = 300  # of each task, for its gate and the router
_POCKET_HELD_OUT = ("units", "roman", "logic", "elements")
MULTI_TASK = Recipe(steps=100, examples=96, lr=1e-3, warmup=15, weight_decay=0.0, checkpoint_every=25)
_ROWS = 100  # questions answered at once


@dataclass(frozen=True)
class Asked:
    """A question, whose task and answer no method sees."""

    task: str
    query: str
    answer: str


class World(Protocol):
    """Tasks, a base and adapters for some of the tasks."""

    @property
    def name(self) -> str:
        """Its name in the results."""

    @property
    def base(self) -> Path:
        """The base model's folder."""

    @property
    def adapters(self) -> Path:
        """An adapter for each held-in task, in a folder of the task's name."""

    @property
    def held_in(self) -> Sequence[str]:
        """Tasks with an adapter in the mixture."""

    @property
    def held_out(self) -> Sequence[str]:
        """Tasks without one."""

    def instruction(self, task: str) -> str:
        """What the task's expert is for, in a sentence."""

    def examples(self, task: str, seed: int) -> Sequence[tuple[str, str]]:
        """(question, answer) pairs of a held-in task, to train gates on."""

    def questions(self, seed: int) -> list[Asked]:
        """Questions of all tasks that no training saw."""

    def right(self, asked: Asked, text: str) -> bool:
        """Whether an answer is right."""

    def multi_task(self) -> Path:
        """One LoRA for all held-in tasks, of the same total rank as their own."""


class Rules:
    """The rule-based tasks, with a base and adapters that are trained on first use."""

    name, held_in, held_out = "rules", rules.HELD_IN, rules.HELD_OUT
    each = 40  # questions of a task and seed

    def __init__(self, work: Path) -> None:
        self.base, self.adapters, self._work = work / "base", work / "adapters", work / "state"
        self._tasks = rules.read_tasks()
        rules.train_base(self.base, self._work)
        for task in self.held_in:
            rules.train_adapter(self.base, [task], self.adapters / task, self._work, seed=0)

    def instruction(self, task: str) -> str:
        return self._tasks[task].instructions[0]

    def examples(self, task: str, seed: int) -> Sequence[tuple[str, str]]:
        return self._tasks[task].sample(seed, EXAMPLES, "train")

    def questions(self, seed: int) -> list[Asked]:
        names = (*self.held_in, *self.held_out)
        return [Asked(n, q, a) for n in names for q, a in self._tasks[n].sample(seed, self.each, "held_out")]

    def right(self, asked: Asked, text: str) -> bool:
        """Exactly the answer; of a list of animals the order does not count."""
        if asked.task == "taxonomy_animal":
            return sorted(text.strip().split(", ")) == sorted(asked.answer.split(", "))
        return clean_answer(text, True) == clean_answer(asked.answer, True)

    def multi_task(self) -> Path:
        folder, rank = self.adapters.with_name("multi-task"), rules.RANK * len(self.held_in)
        rules.train_adapter(self.base, self.held_in, folder, self._work, seed=0, rank=rank, recipe=rules.MULTI_TASK)
        return folder


class Pocket:
    """The pocket fleet's skills and its shipped specialists."""

    name, base, adapters = "pocket", FLEET / "base", FLEET / "adapters"
    held_in, held_out = tuple(name for name in SKILLS if name not in _POCKET_HELD_OUT), _POCKET_HELD_OUT
    each = 30

    def __init__(self, work: Path) -> None:
        self._work = work

    def instruction(self, task: str) -> str:
        return SKILLS[task].description

    def examples(self, task: str, seed: int) -> Sequence[tuple[str, str]]:
        rng = Random(f"glider:{task}:{seed}")
        return [(q.query, q.answer) for q in (SKILLS[task].ask(rng, "train") for _ in range(EXAMPLES))]

    def questions(self, seed: int) -> list[Asked]:
        asked = sample(seed, self.each * len(SKILLS), "one", "held_out")
        return [Asked(q.skills[0], q.query, q.answer) for q in asked]

    def right(self, asked: Asked, text: str) -> bool:
        return is_right((asked.task,), asked.answer, text)

    def multi_task(self) -> Path:
        """As the specialists were trained, on all seven skills at once; a step sees as many questions as theirs."""
        folder, rank = self._work / "multi-task", RANK * len(self.held_in)
        if not (folder / "adapter_model.safetensors").exists():
            model, tokenizer = load_model(self.base).train(), build_tokenizer()
            masters = LoraMasters(model, 0, rank)
            checkpoint = Checkpoint(self._work / "multi-task.safetensors")
            run_loop("pocket-multi-task", MULTI_TASK, self._draw, model, tokenizer, masters, checkpoint)
            save_adapter(masters, folder)
        return folder

    def _draw(self, step: int) -> Pairs:
        rng = Random(f"multi-task:{step}")
        asked = (SKILLS[rng.choice(self.held_in)].ask(rng, "train") for _ in range(MULTI_TASK.examples))
        return [(question.query, question.answer) for question in asked]


class Comparison:
    """One seed's runs in one world."""

    def __init__(self, world: World, seed: int, work: Path) -> None:
        self.world, self.seed, self.work = world, seed, work / str(seed)
        self.questions = sorted(world.questions(seed), key=lambda asked: len(asked.query))
        self.tokenizer = AutoTokenizer.from_pretrained(world.base)

    def methods(self) -> dict[str, Callable[[], list[bool]]]:
        """Every method by name."""
        names = self.world.held_in
        return {
            "base": lambda: self.static(lambda _: RequestMixture.base()),
            "right adapter": lambda: self.static(self._right),
            "uniform merge": lambda: self.static(lambda _: RequestMixture({n: 1 / len(names) for n in names})),
            "random": self.random,
            "arrow": lambda: self.gated("arrow", None),
            "phatgoose": lambda: self.gated("phatgoose", None),
            "glider": lambda: self.gated("glider", lambda g, _: RequestMixture(bias=g.bias)),
            "glider, the base where unsure": lambda: self.gated("glider", _if_sure),
            "glider, query against instructions": lambda: self.gated("glider", self._against_instructions),
            "arrow, steered": lambda: self.gated("arrow", lambda g, _: RequestMixture(bias=g.bias)),
            "multi-task LoRA": self.multi_task,
            "global half alone": lambda: self.gated("arrow", lambda g, _: RequestMixture.only(_best(g.scores))),
        }

    def static(self, wish: Callable[[Asked], RequestMixture]) -> list[bool]:
        return self.answers(self._specialists("static"), [wish(asked) for asked in self.questions])

    def random(self) -> list[bool]:
        """Two adapters drawn anew for each token and layer, with random weights."""
        mixture = self._specialists("arrow", k=2)
        generator = torch.Generator().manual_seed(self.seed)
        for gate in mixture.gates.values():
            gate.score = lambda x: torch.randn(len(x), len(self.world.held_in), generator=generator)  # type: ignore[method-assign]
        return self.answers(mixture, [RequestMixture()] * len(self.questions))

    def multi_task(self) -> list[bool]:
        model = self._base()
        mixture = install_mixture(model, read_adapters({"all": self.world.multi_task()}, model), "static")
        return self.answers(mixture, [RequestMixture.only("all")] * len(self.questions))

    def gated(self, gate: GateName, wish: Callable[[Guidance, int], RequestMixture] | None) -> list[bool]:
        """The gate that `train glider` makes, left to itself or with what `wish` makes of each question's guidance."""
        folder = self.trained(gate)
        mixture = load_mixture(self._base(), folder)
        if wish is None:
            return self.answers(mixture, [RequestMixture()] * len(self.questions))
        router = load_router(folder / "router")
        texts = [asked.query for asked in self.questions]
        guidance = router.guidance(texts, [None] * len(texts)) if isinstance(router, GliderRouter) else []
        return self.answers(mixture, [wish(g, i) for i, g in enumerate(guidance)])

    def trained(self, gate: GateName) -> Path:
        """The mixture of the held-in tasks' adapters."""
        folder = self.work / gate
        data = self.work / "examples"
        data.mkdir(parents=True, exist_ok=True)
        for task in self.world.held_in:
            rows = ({"query": q, "answer": a} for q, a in self.world.examples(task, self.seed))
            (data / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = {
            task: Task(data=data / f"{task}.jsonl", instruction=self.world.instruction(task))
            for task in self.world.held_in
        }
        file = TasksFile(tasks=tasks, batch=8, max_tokens=160)
        spec = GliderSpec(
            base=str(self.world.base), adapters=self.world.adapters, gate=gate, file=file, out=folder, seed=self.seed
        )
        train_glider(spec, on_progress=_log_progress)
        return folder

    @torch.inference_mode()
    def answers(self, mixture: Mixture, wishes: Sequence[RequestMixture]) -> list[bool]:
        """Whether each question is answered rightly, in the order of `questions`."""
        right: list[bool] = []
        for start in range(0, len(self.questions), _ROWS):
            part = self.questions[start : start + _ROWS]
            with mixture.requests(wishes[start : start + _ROWS]):
                told = respond(mixture.model, self.tokenizer, [asked.query for asked in part])
            right += [self.world.right(asked, reply.text) for asked, reply in zip(part, told, strict=True)]
        return right

    def _right(self, asked: Asked) -> RequestMixture:
        """Its own adapter; where its task has none, none."""
        known = asked.task in self.world.held_in
        return RequestMixture.only(asked.task) if known else RequestMixture.base()

    def _against_instructions(self, _: Guidance, number: int) -> RequestMixture:
        """The paper's scores and threshold, with the query's embedding in the place of its instruction's."""
        from routers.embedder import shared_embedder

        told = shared_embedder().embed([self.world.instruction(task) for task in self.world.held_in])
        asked = shared_embedder().embed([self.questions[number].query])
        bias = glider_bias(torch.from_numpy(asked @ told.T))[0].tolist()
        return RequestMixture(bias=dict(zip(self.world.held_in, bias, strict=True)))

    def _specialists(self, gate: str, **options: Any) -> Mixture:
        model = self._base()
        folders = {task: self.world.adapters / task for task in self.world.held_in}
        return install_mixture(model, read_adapters(folders, model), gate, options)

    def _base(self) -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self.world.base, dtype=torch.float32)
        return model.eval()


def _if_sure(guidance: Guidance, _: int) -> RequestMixture:
    return RequestMixture(bias=guidance.bias) if guidance.sure else RequestMixture.base()


def _best(scores: Mapping[str, float]) -> str:
    return max(scores, key=scores.__getitem__)


def _log_progress(step: str, done: int, total: int) -> None:
    if done == total:
        logger.info("%s %d/%d", step, done, total)


def run(world: World, seeds: Sequence[int], work: Path, only: Sequence[str] = ()) -> None:
    """Answer what is not answered yet: WORK/SEED/METHOD.json holds whether each question was answered rightly."""
    for seed in seeds:
        comparison = Comparison(world, seed, work)
        for method, call in comparison.methods().items():
            file = _file(work, seed, method)
            if file.exists() or (only and method not in only):
                continue
            started = time.monotonic()
            right = call()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"tasks": [q.task for q in comparison.questions], "right": right}))
            logger.info(
                "%s, seed %d, %s: %.3f in %.0f s", world.name, seed, method, np.mean(right), time.monotonic() - started
            )


def _file(work: Path, seed: int, method: str) -> Path:
    return work / str(seed) / f"{method.replace(', ', '-').replace(' ', '-')}.json"


def summary(world: World, seeds: Sequence[int], work: Path) -> dict[str, Any]:
    """Accuracy of each method with its bootstrap interval, and GLIDER less each method over the same questions."""
    methods = [m for m in Comparison(world, seeds[0], work).methods() if all(_file(work, s, m).exists() for s in seeds)]
    runs = {m: [json.loads(_file(work, seed, m).read_text()) for seed in seeds] for m in methods}
    tasks = np.array([task for found in runs[methods[0]] for task in found["tasks"]])
    right = {m: np.array([r for found in runs[m] for r in found["right"]], np.float64) for m in methods}
    parts = {"held_in": np.isin(tasks, world.held_in), "held_out": np.isin(tasks, world.held_out)}
    found: dict[str, Any] = {"seeds": list(seeds), "held_in": list(world.held_in), "held_out": list(world.held_out)}
    for part, rows in parts.items():
        draws = metrics.bootstrap(int(rows.sum()))
        figures = {m: metrics.weighted_mean(right[m][rows], draws) for m in methods}
        found[f"{part}_questions"] = int(rows.sum())
        found[f"{part}_accuracy"] = {m: interval(figures[m]) for m in methods}
        found[f"glider_less_{part}"] = {m: interval(figures["glider"] - figures[m]) for m in methods if m != "glider"}
    found["tasks"] = {
        m: {task: round(float(right[m][tasks == task].mean()), 4) for task in (*world.held_in, *world.held_out)}
        for m in methods
    }
    found["by_seed"] = {m: {part: _by_seed(runs[m], getattr(world, part)) for part in parts} for m in methods}
    return found


def _by_seed(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[float]:
    """Accuracy on these tasks in each seed."""
    return [round(float(np.mean(np.array(run["right"])[np.isin(run["tasks"], tasks)])), 4) for run in runs]


WORLDS: Mapping[str, Callable[[Path], World]] = {"rules": Rules, "pocket": Pocket}


def with_tables(document: str, results: Mapping[str, Any]) -> str:
    """`document` with its tables made from the results: `<!-- rules -->`, `<!-- rules-tasks -->` and so on."""

    def table_of(name: str) -> str | None:
        world, _, kind = name.partition("-")
        if world not in results:
            return None
        return _tasks_table(results[world]) if kind == "tasks" else _accuracy_table(results[world])

    return fill_tables(document, table_of)


def _accuracy_table(found: Mapping[str, Any]) -> str:
    head = ["method", "held-in", "GLIDER less it", "held-out", "GLIDER less it"]
    rows = [
        [method, *(cell for part in ("held_in", "held_out") for cell in _cells(found, part, method))]
        for method in found["held_in_accuracy"]
    ]
    return markdown(head, rows)


def _cells(found: Mapping[str, Any], part: str, method: str) -> list[str]:
    own, less = found[f"{part}_accuracy"][method], found[f"glider_less_{part}"].get(method)
    difference = f"{100 * less['value']:+.1f} ({100 * less['low']:+.1f} to {100 * less['high']:+.1f})" if less else ""
    return [f"{own['value']:.1%} ({100 * own['low']:.0f} to {100 * own['high']:.0f})", difference]


def _tasks_table(found: Mapping[str, Any]) -> str:
    names = [*found["held_in"], *found["held_out"]]
    rows = [[method, *(f"{100 * own[name]:.0f}" for name in names)] for method, own in found["tasks"].items()]
    return markdown(["method", *names], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("worlds", nargs="*", choices=["", *WORLDS], help="by default both")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", default=[], help="a method; repeatable")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    path = RESULTS / "glider.json"
    results = json.loads(path.read_bytes())["results"] if path.exists() else {}
    for name in args.worlds or WORLDS:
        world = WORLDS[name](args.work / name)
        run(world, range(args.seeds), args.work / name, args.only)
        results[name] = summary(world, range(args.seeds), args.work / name)
        write("glider", results, command=COMMAND)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8"), results), "utf-8")


if __name__ == "__main__":
    main()
