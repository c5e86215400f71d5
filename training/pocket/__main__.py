"""The pocket fleet's command line: ``python -m training.pocket``."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from training.pocket.fleet import BASE, FLEET, GENERALIST, POLICY, Member
from training.pocket.grading import grade, grade_each, sample
from training.pocket.questions import PocketError
from training.pocket.skills import SKILLS

WORK = Path.home() / ".cache" / "router-service" / "pocket"


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _track(members: Sequence[Member]) -> Iterator[Member]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(members, description="asking the experts", console=Console(stderr=True)))


def _sample(args: argparse.Namespace) -> None:
    for q in sample(args.seed, args.n, args.kind, args.split):
        _print(json.dumps({"id": q.id, "skills": list(q.skills), "query": q.query, "answer": q.answer}))


def _read_lines(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise PocketError(f"line {number} is not JSON: {error}") from error
        fields = ("query", "answer", "response")
        if not isinstance(line, dict) or not all(isinstance(line.get(field), str) for field in fields):
            raise PocketError(f"line {number} must be an object with the strings {', '.join(fields)}")
        yield line


def _grade(args: argparse.Namespace) -> None:
    if args.each:
        for right in grade_each(_read_lines(sys.stdin)):
            _print(json.dumps({"right": right}))
        return
    graded = grade(_read_lines(sys.stdin))
    if graded["overall"] is None:
        raise PocketError("there is nothing to grade: one JSON line for each response is read from standard input")
    _print(json.dumps(graded))


def _train(args: argparse.Namespace) -> None:
    from training.pocket import policy
    from training.pocket.train import RECIPES, train

    for name in args.members:
        given = {field: value for field in ("steps", "examples", "lr") if (value := getattr(args, field)) is not None}
        if name == POLICY:
            policy.train_policy(args.folder, args.work, args.seed, replace(policy.RECIPE, **given))
            continue
        recipe = replace(RECIPES[name], **given)
        train(name, args.folder, args.work, args.seed, recipe, from_weights=args.from_weights)


def _evaluate(args: argparse.Namespace) -> None:
    from training.pocket.evaluate import accuracy_table, evaluate, write_report

    report = evaluate(args.folder, args.seed, args.one, args.two, _track, args.work)
    _print(accuracy_table(report))
    for condition in report.conditions():
        relation = "<=" if condition.at_most else ">="
        met = "met" if condition.met else "MISSED"
        _print(f"{condition.name}: {condition.value:.1%} {relation} {condition.bound:.0%} {met}")
    if args.write:
        write_report(report, args.folder)


def _observe(args: argparse.Namespace) -> None:
    from training.pocket.observe import observe

    observe(args.folder, args.seed, track=_track, kept=args.work)


def _build(args: argparse.Namespace) -> None:
    from training.pocket.build import train_all
    from training.pocket.evaluate import accuracy_table, evaluate, write_report
    from training.pocket.observe import observe

    train_all(args.folder, args.work, args.seed)
    report = evaluate(args.folder, args.seed, track=_track, kept=args.work)
    write_report(report, args.folder)
    observe(args.folder, args.seed, track=_track, kept=args.work)
    _print(accuracy_table(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.pocket", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.add_argument("--seed", type=int, default=0)
        sub.set_defaults(run=run)
        return sub

    sub = command("sample", _sample, "Print fresh questions as JSON lines: id, skills, query, answer.")
    sub.add_argument("--n", type=_count, default=10, help="how many")
    sub.add_argument("--kind", choices=("one", "two"), default="one", help="how many skills a question needs")
    sub.add_argument("--split", choices=("held_out", "train"), default="held_out")
    sub = command(
        "grade", _grade, "Read JSON lines with query, answer and response; print the share right, overall and by skill."
    )
    sub.add_argument("--each", action="store_true", help="print a JSON line for each response instead")
    sub = command("train", _train, "Train members of the fleet, or go on from their checkpoints.")
    sub.add_argument("members", nargs="+", choices=(BASE, GENERALIST, POLICY, *SKILLS), metavar="MEMBER")
    _add_folders(sub)
    sub.add_argument("--from-weights", action="store_true", help="go on from the weights in the fleet's folder")
    sub.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's")
    sub.add_argument("--examples", type=int, help="questions per step, instead of the recipe's")
    sub.add_argument("--lr", type=float, help="peak learning rate, instead of the recipe's")
    sub = command("evaluate", _evaluate, "Measure every expert on held-out questions.")
    _add_folders(sub)
    sub.add_argument("--one", type=int, default=1100, help="one-skill questions")
    sub.add_argument("--two", type=int, default=400, help="two-skill questions")
    sub.add_argument("--write", action="store_true", help="write the model card and evaluation.json")
    _add_folders(command("observe", _observe, "Write the observation table that routers are fitted on."))
    _add_folders(command("build", _build, "Train, measure and observe the whole fleet."))
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=FLEET, help="the fleet's folder")
    parser.add_argument("--work", type=Path, default=WORK, help="where checkpoints and answers are kept")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors of the pocket fleet are one line on stderr and status 1."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        args.run(args)
    except PocketError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
