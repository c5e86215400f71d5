"""Every figure of docs/router_r1.md: ``python -m training.router_r1.results --start FOLDER --work FOLDER``.

Trains what is not in the work folder yet (three seeds without a cost weight, .6, .8, and one without the format's
reward), measures all on the same held-out questions, and writes docs/results/router-r1.json and its plots. What is
trained and measured lies in the work folder, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experts.cards import ExpertCard
from routers.contracts import Observations
from routers.registry import create_router, router_names
from training.doc_tables import fill_tables, markdown
from training.evaluation import Bench
from training.metrics import bootstrap, weighted_mean
from training.observations import Table, load_table
from training.pocket.fleet import FLEET, members
from training.pocket.planner import UNSEEN
from training.results import RESULTS, write
from training.router_r1.environment import Environment, Renamed
from training.router_r1.measure import Json, figures, interval, play
from training.router_r1.questions import Asked, pocket_questions
from training.router_r1.rewards import Rewards
from training.router_r1.rollout import Episode
from training.router_r1.spec import RouterR1Spec, read_spec
from training.router_r1.train import (
    fleet_cards,
    limits_of,
    load_policy,
    make_environment,
    outcome_of,
    train_policy,
)
from training.work_folder import read_report, write_json

logger = logging.getLogger(__name__)

DOCUMENT = Path("docs/router_r1.md")
START = "start"
RUNS: Mapping[str, Mapping[str, Any]] = {
    "seed-0": {"seed": 0},
    "seed-1": {"seed": 1},
    "seed-2": {"seed": 2},
    "cost-0.6": {"cost_weight": 0.6},
    "cost-0.8": {"cost_weight": 0.8},
    "no-format": {"format_reward": False},
}
"""What each run changes of the config."""
NEWCOMERS = {
    "arithmetic": ("sulda-3", "Plus, minus and times for numbers."),
    "units": ("brimo", "Meters to feet, kilograms to grams, hours to minutes."),
    "roman": ("pocket-vekta", "Roman numerals from numbers, numbers from Roman numerals."),
    "sorting": ("ostil-oka", "Lists in ascending, descending or alphabetical order."),
    "text": ("nagru-11", "Reverses words, removes letters, changes case."),
    "dates": ("pocket-imsel", "ISO dates, months and days."),
    "data": ("yarvo", "Fields of JSON, rows of CSV."),
    "ciphers": ("dwelk-8", "Secret writing: Caesar and Atbash."),
    "elements": ("pocket-rhun", "Chemistry: symbols and atomic numbers."),
    "capitals": ("fosk-eta", "Countries and their capital cities."),
}
"""Specialists under names and with descriptions that no training has: experts that are new to the policy."""
_QUESTIONS_SEED = 1000
_SAMPLED_SEED = 7


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m training.router_r1.results", description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="the policy that was trained on demonstrations alone")
    parser.add_argument("--work", type=Path, required=True, help="where trained policies are kept")
    parser.add_argument("--config", type=Path, default=Path("deploy/router_r1/pocket.yaml"))
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--questions", type=int, default=300, help="of each kind")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    spec = read_spec(args.config, policy=str(args.start.resolve()), recorded=str(args.work.resolve() / "replies.jsonl"))
    for name in args.runs:
        _train(spec, name, args.work)
    results = measure_all(spec, args.work, args.runs, args.questions)
    write("router-r1", results, command="python -m training.router_r1.results --start START --work WORK")
    plot(results, RESULTS / "router-r1.png")
    DOCUMENT.write_text(fill_tables(DOCUMENT.read_text("utf-8"), lambda name: _table(results, name)), "utf-8")


def _train(spec: RouterR1Spec, name: str, work: Path) -> None:
    out = work.resolve() / name
    if not out.exists():
        logger.info("training %s", name)
        changed = spec.model_copy(update={**RUNS[name], "out": out})
        train_policy(changed, on_progress=lambda step, done, total: logger.info("%s %s %d/%d", name, step, done, total))


def measure_all(spec: RouterR1Spec, work: Path, runs: Sequence[str], count: int) -> Json:
    """All policies, the start among them, on the same held-out questions; and every router beside them."""
    questions, kept = pocket_questions(_QUESTIONS_SEED, count, count, "held_out"), work / "measured" / str(count)
    known = [question for question in questions if question.id not in _ids_of_unseen(questions, spec)]
    environment = make_environment(spec.model_copy(update={"without": ()}))
    try:
        policies = {
            name: _kept(kept / f"{name}.json", partial(_measured, spec, work, name, questions, known, environment))
            for name in (START, *runs)
        }
        for one in policies.values():
            one["reward"]["over_start"] = _difference(one["rewards"], policies[START]["rewards"])
        for one in policies.values():
            del one["rewards"]
        newcomers = {
            name: _kept(kept / f"newcomers-{name}.json", partial(_newcomers, spec, work, name, known, environment))
            for name in policies
        }
    finally:
        environment.close()
    return {
        "questions": {"each kind": count, "seed": _QUESTIONS_SEED},
        "policies": policies,
        "newcomers": newcomers,
        "single_round": _kept(kept / "single-round.json", partial(single_round, questions)),
    }


def _kept(path: Path, measure: Callable[[], Json]) -> Json:
    """What was measured before, or what is measured now."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    kept: Json = json.loads(path.read_bytes())
    return kept


def _measured(
    spec: RouterR1Spec,
    work: Path,
    name: str,
    questions: Sequence[Asked],
    known: Sequence[Asked],
    environment: Environment,
) -> Json:
    logger.info("measuring %s", name)
    model, tokenizer = _loaded(spec, work, name)
    cards, limits = fleet_cards(spec.model_copy(update={"without": ()})), limits_of(spec)
    greedy = replace(limits, temperature=0.0)

    def played(asked: Sequence[Asked], shown: Sequence[ExpertCard], limits: Any = greedy) -> list[Episode]:
        return play(model, tokenizer, asked, shown, environment, limits)

    episodes = played(questions, cards)
    import torch

    torch.manual_seed(_SAMPLED_SEED)
    seen = [card for card in cards if card.name not in spec.without]
    sampled = played(known, seen, limits)
    # The reward that all are compared by: of answers alone, as in training without a cost weight.
    rewards = Rewards()([outcome_of(one, question) for one, question in zip(sampled, known, strict=True)])
    draws = bootstrap(len(rewards))
    return {
        "kinds": figures(episodes, questions),
        "usd_per_1k": round(1e3 * float(np.mean([one.usd for one in episodes])), 6),
        "right": round(float(np.mean(_rights(episodes, questions))), 4),
        "reward": {"sampled": interval(weighted_mean(np.asarray(rewards), draws))},
        "rewards": rewards,
        "unseen": _unseen(played, cards),
        **({} if name == START else {"training": _training(work / name)}),
    }


def _loaded(spec: RouterR1Spec, work: Path, name: str) -> tuple[Any, Any]:
    folder = spec.policy if name == START else str(work / name)
    model, tokenizer = load_policy(spec.model_copy(update={"policy": folder}))
    return model.eval(), tokenizer


def _newcomers(spec: RouterR1Spec, work: Path, name: str, questions: Sequence[Asked], environment: Environment) -> Json:
    """One-skill questions, each with its specialist exchanged for the newcomer: whether that is asked, and is used."""
    logger.info("measuring %s with newcomers", name)
    model, tokenizer = _loaded(spec, work, name)
    limits = replace(limits_of(spec), temperature=0.0)
    cards = [card for card in fleet_cards(spec.model_copy(update={"without": ()})) if card.name not in spec.without]
    called: list[float] = []
    right: list[float] = []
    without: list[float] = []
    for skill, (new, description) in NEWCOMERS.items():
        asked, old = [question for question in questions if question.skills == (skill,)], f"pocket-{skill}"
        others = [card for card in cards if card.name != old]
        own = next(card for card in cards if card.name == old)
        joined = [*others, own.model_copy(update={"name": new, "description": description})]
        episodes = play(model, tokenizer, asked, joined, Renamed(environment, {new: old}), limits)
        called += [float(any(search.expert == new for search in one.searches)) for one in episodes]
        right += _rights(episodes, asked)
        without += _rights(play(model, tokenizer, asked, others, environment, limits), asked)
    draws = bootstrap(len(called))
    columns = {"called": called, "right": right, "right_without": without}
    shares = {column: interval(weighted_mean(np.asarray(values), draws)) for column, values in columns.items()}
    return {"questions": len(called), **shares}


def _training(folder: Path) -> Json:
    report = read_report(folder)
    return {"seconds": report["seconds"], "curves": report["curves"]}


def _unseen(played: Any, cards: Sequence[ExpertCard]) -> Json:
    """Questions of the skill whose specialist the policy never saw, with its card and without."""
    every = pocket_questions(_QUESTIONS_SEED + 1, 1200, 0, "held_out")
    asked = [question for question in every if question.skills == (UNSEEN,)]
    expert = f"pocket-{UNSEEN}"
    found = {}
    for name, shown in (("with", list(cards)), ("without", [card for card in cards if card.name != expert])):
        episodes = played(asked, shown)
        draws = bootstrap(len(asked))
        called = [float(any(search.expert == expert for search in one.searches)) for one in episodes]
        found[name] = {
            "right": interval(weighted_mean(np.asarray(_rights(episodes, asked)), draws)),
            "called": interval(weighted_mean(np.asarray(called), draws)),
        }
    return {"expert": expert, "questions": len(asked), **found}


def _rights(episodes: Sequence[Episode], questions: Sequence[Asked]) -> list[float]:
    return [outcome_of(one, question).quality for one, question in zip(episodes, questions, strict=True)]


def _ids_of_unseen(questions: Sequence[Asked], spec: RouterR1Spec) -> set[str]:
    hidden = {name.removeprefix("pocket-") for name in spec.without}
    return {question.id for question in questions if hidden & set(question.skills)}


def _difference(rewards: Sequence[float], start: Sequence[float]) -> Json:
    """Of the mean reward, by the paired bootstrap over the questions."""
    return interval(weighted_mean(np.asarray(rewards) - np.asarray(start), bootstrap(len(rewards))))


def single_round(questions: Sequence[Asked]) -> Json:
    """The frontier of every router that sends a question to one expert, fitted on the shipped table."""
    shipped = load_table(FLEET)
    table = Table(cards=shipped.cards, train=shipped.train, test=_answered(questions, shipped.cards))
    bench = Bench(table)
    found: Json = {}
    for name in router_names():
        if name == "router_retriever":  # routes among encoders
            continue
        evaluation = bench.measure_router(create_router(name, {"seed": 0}).fit(table.train))
        cost, quality = evaluation.frontier.hulls[0]
        found[name] = {
            "usd_per_1k": [round(1e3 * float(one), 6) for one in cost],
            "right": [round(float(one), 4) for one in quality],
        }
    return found


def _answered(questions: Sequence[Asked], cards: Sequence[ExpertCard]) -> Observations:
    """What each expert alone does with the questions."""
    from training.pocket.answers import answers

    by_name = {member.name: member for member in members()}
    shape = (len(questions), len(cards))
    quality, cost, read, wrote = (np.zeros(shape, np.float32) for _ in range(4))
    for column, card in enumerate(cards):
        logger.info("asking %s", card.name)
        responses = answers(by_name[card.name], [question.text for question in questions], None)
        for row, (question, response) in enumerate(zip(questions, responses, strict=True)):
            quality[row, column] = question.grade(response.text)
            cost[row, column] = by_name[card.name].cost(response.input_tokens, response.output_tokens)
            read[row, column], wrote[row, column] = response.input_tokens, response.output_tokens
    return Observations(
        ids=[question.id for question in questions],
        texts=[question.text for question in questions],
        tasks=[question.kind for question in questions],
        cards=cards,
        quality=quality,
        cost_usd=cost,
        input_tokens=read,
        output_tokens=wrote,
        latency_s=np.full(shape, np.nan, np.float32),
    )


def _table(results: Json, name: str) -> str | None:
    """The document's table of that name."""
    rows: list[list[str]] = []
    if name == "policies":
        head = [
            "policy",
            "two skills",
            "one skill",
            "calls (two, one)",
            "USD per 1,000",
            "broken",
            "sampled reward",
            "over start",
        ]
        for policy, found in results["policies"].items():
            two, one = found["kinds"]["two"], found["kinds"]["one"]
            broken = f"{100 * (two['broken']['value'] + one['broken']['value']) / 2:.2f}%"
            calls = f"{two['calls']['value']:.2f}, {one['calls']['value']:.2f}"
            over = _spread(found["reward"]["over_start"], "+.3f") if policy != START else ""
            rows.append(
                [
                    policy, _spread(two["right"], ".1%"), _spread(one["right"], ".1%"), calls,
                    f"{found['usd_per_1k']:.4f}", broken, _spread(found["reward"]["sampled"], ".3f"), over,
                ]
            )  # fmt: skip
        return markdown(head, rows)
    if name == "unseen":
        for policy, found in results["policies"].items():
            shown, hidden = found["unseen"]["with"], found["unseen"]["without"]
            rows.append([policy, *(_spread(x, ".1%") for x in (shown["called"], shown["right"], hidden["right"]))])
        return markdown(["policy", "called, with its card", "right, with its card", "right, without"], rows)
    if name == "newcomers":
        for policy, found in results["newcomers"].items():
            rows.append([policy, *(_spread(found[key], ".1%") for key in ("called", "right", "right_without"))])
        return markdown(["policy", "newcomer called", "right", "right without it"], rows)
    if name == "single-round":
        for router, found in results["single_round"].items():
            best = int(np.argmax(found["right"]))
            rows.append([router, f"{found['right'][best]:.1%}", f"{found['usd_per_1k'][best]:.4f}"])
        return markdown(["router", "most right", "USD per 1,000 there"], rows)
    return None


def _spread(found: Json, form: str) -> str:
    value, low, high = (format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def plot(results: Json, path: Path) -> None:
    """Curves of the runs, and the policies among the frontiers of single-round routing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    rewards, broken, frontier = figure.subplots(1, 3)
    for name, one in results["policies"].items():
        if "training" in one:
            lines = one["training"]["curves"]
            steps = [line["step"] for line in lines]
            rewards.plot(steps, [line["reward"] for line in lines], label=name)
            broken.plot(steps, [line["broken"] for line in lines], label=name)
        frontier.plot(one["usd_per_1k"], one["right"], "*", label=f"router_r1, {name}")
    for name, one in results["single_round"].items():
        frontier.plot(one["usd_per_1k"], one["right"], ".-", label=name)
    for axes, (across, up) in zip(
        (rewards, broken, frontier),
        (("step", "reward"), ("step", "broken format"), ("USD for the calls of 1,000 questions", "right")),
        strict=True,
    ):
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
