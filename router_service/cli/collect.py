"""`router-service collect` and `router-service export`: tables of observations to train routers on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from router_service.cli.client import Url, checked, client_options, connect
from router_service.cli.console import CommandError, errors, out, write_json
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from experts.cards import ExpertCard
    from router_service.state.link import RedisLink
    from training.collect import Collected, Plan
    from training.export import Export
    from training.prompts import Prompt

_Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder that the table goes to.")]
_TestShare = Annotated[
    float, typer.Option(min=0, max=1, help="Share of rows that become test rows, by a hash of their text.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def collect(
    prompts: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="JSON lines: id, query or messages, task, answer, grader.")
    ],
    out_folder: _Out,
    expert: Annotated[list[str] | None, typer.Option(help="Ask this expert; repeat for more. Default: all.")] = None,
    grader: Annotated[
        str, typer.Option(help="exact, contains, numeric, choice, f1 or judge, where a prompt names none.")
    ] = "exact",
    judge: Annotated[str | None, typer.Option(help="The expert that grades, for the grader judge.")] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0, help="Ceiling in USD over all runs into --out: no call is made that may pass it."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of one answer at most.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls under way at once.")] = 8,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that one answer may take.")] = 300.0,
    test_share: _TestShare = 0.3,
    url: Url = None,
    as_json: _Json = False,
) -> None:
    """Ask every expert every prompt, grade the answers, and write a table of observations.

    Every answer is kept in a journal in --out: a second run asks only what is missing, and grading anew costs nothing.

    Examples:

      router-service collect --prompts sums.jsonl --out data/sums --grader numeric

      router-service collect --prompts chats.jsonl --out data/chats --grader judge --judge gpt --max-cost 5
    """
    from training.collect import Plan, table_rows
    from training.graders import GRADER_NAMES
    from training.observations import write_table
    from training.prompts import read_prompts

    if grader not in GRADER_NAMES:
        raise CommandError(f"grader {grader!r} is not one of {', '.join(GRADER_NAMES)}", status=2)
    asked = read_prompts(prompts)
    known = _cards(url)
    plan = Plan(
        prompts=asked,
        cards=[_named(known, name) for name in expert or known if expert or _is_routed(known[name])],
        grader=grader,
        judge=_named(known, judge) if judge else None,
        max_tokens=max_tokens,
        temperature=temperature,
        max_cost_usd=max_cost,
        concurrency=concurrency,
    )
    collected = asyncio.run(_run(plan, url, out_folder, timeout_s))
    if collected.graded:
        write_table(out_folder, plan.cards, table_rows(collected.graded, _routed_text, test_share))
    _report(collected, plan, out_folder, as_json)


def _is_routed(card: ExpertCard) -> bool:
    """Whether a policy could choose it for an answer."""
    return card.routed and card.kind != "embedding"


async def _run(plan: Plan, url: str | None, folder: Path, timeout_s: float) -> Collected:
    import httpx

    from router_service.cli.ask import ServiceAsk
    from training.collect import collect as run
    from training.journal import Journal

    limits = httpx.Limits(max_connections=plan.concurrency, max_keepalive_connections=plan.concurrency)
    timeout = httpx.Timeout(timeout_s, connect=10.0)
    with steps() as on_step, Journal(folder / "journal.jsonl") as journal:

        def on_progress(collected: Collected) -> None:
            on_step(f"collect: {collected.spent_usd:.4f} USD", collected.done, collected.total)

        async with httpx.AsyncClient(**client_options(url), limits=limits, timeout=timeout) as client:
            return await run(plan, ServiceAsk(client), journal, on_progress)


def _cards(url: str | None) -> dict[str, ExpertCard]:
    """The cards of the service's experts, by name."""
    from experts.cards import ExpertCard

    with connect(url) as client:
        models = checked(client.get("/v1/models"))["data"]
    return {
        model["id"]: ExpertCard.model_validate(model["expert"]) for model in models if model.get("kind") == "expert"
    }


def _named(known: Mapping[str, ExpertCard], name: str) -> ExpertCard:
    if name not in known:
        raise CommandError(f"the service has no expert {name!r}; it has {', '.join(known)}", status=2)
    return known[name]


def _routed_text(prompt: Prompt) -> str:
    """What the service would embed of the prompt's conversation."""
    from routers.query import query_from_body

    return query_from_body("chat/completions", {"messages": prompt.chat}).text


def _report(collected: Collected, plan: Plan, folder: Path, as_json: bool) -> None:
    summary = [_of_expert(collected, card.name) for card in plan.cards]
    if as_json:
        failed = [{"prompt": prompt, "expert": expert, "error": error} for prompt, expert, error in collected.failed]
        write_json({"spent_usd": collected.spent_usd, "experts": summary, "failed": failed})
        return
    table = Table("expert", "graded", "quality", "USD per 1k", "failed", "over the ceiling")
    for row in summary:
        means = (f"{row['quality']:.3f}", f"{row['cost_usd_per_1k']:.4f}") if row["graded"] else ("-", "-")
        table.add_row(row["expert"], str(row["graded"]), *means, str(row["failed"]), str(row["unaffordable"]))
    out.print(table)
    out.print(f"spent {collected.spent_usd:.4f} USD in all; table: {folder}", soft_wrap=True)
    for prompt, expert, error in collected.failed[:5]:
        errors.print(f"{prompt} by {expert} failed: {error}", soft_wrap=True, markup=False)
    if collected.failed:
        errors.print(f"{len(collected.failed)} pairs failed: the same command asks them again")


def _of_expert(collected: Collected, expert: str) -> dict[str, Any]:
    graded = [pair for pair in collected.graded if pair.expert == expert]
    count = len(graded)
    return {
        "expert": expert,
        "graded": count,
        "quality": sum(pair.quality for pair in graded) / count if count else None,
        "cost_usd_per_1k": 1000 * sum(pair.reply.cost_usd for pair in graded) / count if count else None,
        "failed": sum(name == expert for _, name, _ in collected.failed),
        "unaffordable": sum(name == expert for _, name in collected.unaffordable),
    }


def export(
    out_folder: _Out,
    test_share: _TestShare = 0.3,
    url: Url = None,
    as_json: _Json = False,
) -> None:
    """Write what the service did, and how it was rated, as a table of observations.

    Reads the ledger and the feedback from the service's Redis (REDIS_URL, or the embedded one in ROUTER_DATA_FOLDER).
    Only answers that were rated and whose text was kept (ROUTER_LEDGER_TEXT=true) can become rows.

    Example:

      router-service export --out data/production
    """
    exported = asyncio.run(_export(_cards(url), out_folder, test_share))
    if as_json:
        write_json({"rows": len(exported.rows), "left_out": dict(exported.left_out)})
        return
    out.print(f"{len(exported.rows)} rows: {out_folder}", soft_wrap=True)
    for reason, count in exported.left_out.most_common():
        out.print(f"{count} left out: {reason}")


async def _export(cards: Mapping[str, ExpertCard], folder: Path, test_share: float) -> Export:
    from router_service.cli.promote import redis_link
    from router_service.state.ledger import FEEDBACK, LEDGER
    from training.export import Export
    from training.observations import write_table

    async with redis_link() as link:
        ratings = {(given["id"], given["key"]): given["rating"] async for given in _entries(link, FEEDBACK)}
        ledger = [entry async for entry in _entries(link, LEDGER)]
    exported = Export(ledger, ratings, cards.keys(), test_share)
    if exported.rows:
        write_table(folder, list(cards.values()), exported.rows)
    return exported


async def _entries(link: RedisLink, stream: str) -> AsyncIterator[dict[str, Any]]:
    from router_service.state.ledger import read_stream

    after = "-"
    while page := await read_stream(link, stream, after=after):
        after = page[-1][0]
        for _, entry in page:
            yield entry
