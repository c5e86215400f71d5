"""The aggregation prompt: one question, the answers that others gave, and the request to write the right one.

Mixture-of-Agents (arXiv 2406.04692) puts its instruction into a long system message. Here it is short and stands in
the user's own message, so that the conversation, its tools and its images stay as they are, and so that a model of a
few million parameters can learn to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT = "{question}\n\nAnswers of others:\n{answers}\n\nWrite the right answer."
"""The default; an operator's own prompt has the same two places."""


def aggregation_text(question: str, answers: Sequence[str], prompt: str = PROMPT) -> str:
    """`prompt` filled with the question and the numbered answers; braces in either stay what they are."""
    listed = "\n".join(f"{number}. {answer.strip()}" for number, answer in enumerate(answers, 1))
    before, _, rest = prompt.partition("{question}")
    between, _, after = rest.partition("{answers}")
    return f"{before}{question}{between}{listed}{after}"


def aggregation_body(body: Mapping[str, Any], answers: Sequence[str], prompt: str = PROMPT) -> dict[str, Any]:
    """The client's body with the answers put into its last user message, or into its `prompt`."""
    if "messages" not in body:
        return {**body, "prompt": aggregation_text(str(body.get("prompt", "")), answers, prompt)}
    messages = list(body["messages"])
    place = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=len(messages) - 1)
    messages[place] = {**messages[place], "content": _with_answers(messages[place].get("content"), answers, prompt)}
    return {**body, "messages": messages}


def _with_answers(content: Any, answers: Sequence[str], prompt: str) -> Any:
    """The message's content with the answers: text as text, parts (images among them) with their last text changed."""
    if not isinstance(content, list):
        return aggregation_text(content or "", answers, prompt)
    parts = list(content)
    places = [i for i, part in enumerate(parts) if isinstance(part, Mapping) and part.get("type") == "text"]
    if not places:
        return [*parts, {"type": "text", "text": aggregation_text("", answers, prompt)}]
    parts[places[-1]] = {
        **parts[places[-1]],
        "text": aggregation_text(parts[places[-1]].get("text", ""), answers, prompt),
    }
    return parts
