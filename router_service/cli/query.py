"""`router-service query`: ask a running service, and read the answer as it is written."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import CommandError, out, write_json

if TYPE_CHECKING:
    import httpx

_DATA = "data: "
_DONE = "[DONE]"


def query(
    text: Annotated[str | None, typer.Argument(help="The question; '-' or nothing reads it from stdin.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="An expert, or a policy: auto, auto:cheap ...")] = "auto",
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens that the answer may have.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Say who was asked, why, and what it cost.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON, not streamed.")] = False,
    url: Url = None,
) -> None:
    """Ask a question; the answer is streamed to the terminal.

    Examples:

      router-service query "What is 17 + 25?"

      echo "Reverse the word table." | router-service query --trace

      router-service query -m auto:cheap --json "Capital of France?"
    """
    body = _body(_read(text), model, system, max_tokens)
    if trace:
        body["router"] = {"trace": True}
    with connect(url) as client:
        if as_json:
            write_json(checked(client.post("/v1/chat/completions", json=body)))
            return
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            _show(response)


def _read(text: str | None) -> str:
    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        raise CommandError('no question: router-service query "..."', status=2)
    if not (text := sys.stdin.read().strip()):
        raise CommandError("no question: stdin is empty", status=2)
    return text


def _body(text: str, model: str, system: str | None, max_tokens: int | None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    body: dict[str, Any] = {"model": model, "messages": messages}
    return body | ({"max_tokens": max_tokens} if max_tokens is not None else {})


def _show(response: httpx.Response) -> None:
    if not response.is_success:
        response.read()
        checked(response)
    trace = None
    for line in response.iter_lines():
        if not line.startswith(_DATA) or line == _DATA + _DONE:
            continue
        chunk = json.loads(line.removeprefix(_DATA))
        if "error" in chunk:
            sys.stdout.write("\n")
            raise CommandError(chunk["error"]["message"])
        trace = chunk.get("router", trace)
        sys.stdout.write("".join(choice["delta"].get("content") or "" for choice in chunk["choices"]))
        sys.stdout.flush()
    sys.stdout.write("\n")
    if trace:
        _show_trace(trace)


def _show_trace(trace: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("expert", "why", "tokens in", "out", "USD", "seconds", "error", title=_reason(trace), box=None)
    for call in trace["calls"]:
        tokens = str(call["input_tokens"]), str(call["output_tokens"])
        cost, seconds = f"{call['cost_usd']:.8f}", f"{call['latency_s']:.3f}"
        table.add_row(call["expert"], call["why"], *tokens, cost, seconds, call["error"] or "")
    out.print(table)


def _reason(trace: dict[str, Any]) -> str:
    reason: str = trace["decision"]["reason"] if trace["decision"] else "the caller named the expert"
    return f"{reason} (cache: {trace['cache']})"
