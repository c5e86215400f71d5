"""The tag protocol of Router-R1 (arXiv 2506.09033): what the policy model reads and what it may write.

A conversation with the policy has the fleet's cards in its first message and the question in the second. Every turn of
the policy is ``<think>..</think>`` and then either ``<search> EXPERT:sub-query </search>`` or ``<answer>..</answer>``;
each search is answered by the next user's message, ``<information>..</information>``. The paper writes all of it into
one text; turns of a conversation are the same tokens in a chat template's frame, and any chat model can take them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experts.cards import ExpertCard

Message = dict[str, Any]
Kind = Literal["search", "answer", "broken"]

MAX_CALLS = 4
"""How many experts the policy may ask for one question."""
LAST_TURN = "No calls are left: answer now."
"""Added to the information after the last call."""
NO_REPLY = "error: no reply"
"""The information after a call that failed."""
TAGS = ("think", "search", "information", "answer")
CLOSING = ("</search>", "</answer>")
"""What ends a turn."""
_SPELLED = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]

_TAG = re.compile("|".join(map(re.escape, _SPELLED)))
_BEGUN = sorted({re.escape(tag[:end]) for tag in _SPELLED for end in range(1, len(tag))})
_MAYBE_TAG = re.compile(f"{_TAG.pattern}|(?:{'|'.join(_BEGUN)})$")
_LIKE_A_TAG = re.compile(rf"<(?=[\s/\\]*(?:{'|'.join(TAGS)})\b)|<(?=\|)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the policy, parsed.

    `kind` says what it does: `search` asks `expert` the sub-query `text`, `answer` ends with `text`, and `broken` keeps
    not to the protocol, `text` being why. `thought` is what it thought before.
    """

    kind: Kind
    text: str
    thought: str = ""
    expert: str | None = None


def first_turn(text: str) -> str:
    """`text` up to its first closing tag of a search or an answer: what comes after it is not the policy's to write."""
    ends = [place + len(tag) for tag in CLOSING if (place := text.find(tag)) >= 0]
    return text[: min(ends)] if ends else text


def parse(turn: str, experts: Sequence[str]) -> Turn:
    """What a whole turn of the policy says; never raises.

    A turn is one thought and one search or answer, each in its own pair of tags, with nothing but spaces between them.
    An expert is one of `experts`, exactly, before the first colon that follows its name; the sub-query may hold more.
    """
    thought, rest = _section("think", turn)
    if thought is None:
        return Turn("broken", "a turn begins with one <think>..</think>")
    for kind in ("search", "answer"):
        said, left = _section(kind, rest)
        if said is None:
            continue
        if left.strip():
            return Turn("broken", f"nothing may follow </{kind}>", thought)
        if kind == "answer":
            return Turn("answer", said, thought) if said else Turn("broken", "the answer is empty", thought)
        return _search(said, thought, experts)
    return Turn("broken", "after the thought comes one <search>..</search> or <answer>..</answer>", thought)


def _section(tag: str, text: str) -> tuple[str | None, str]:
    """What `text` has in its leading pair of `tag`, and what follows; None where it begins with no such pair.

    A pair with another tag in it is none.
    """
    text = text.lstrip()
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.find(closing)
    if not text.startswith(opening) or end < 0:
        return None, text
    inner = text[len(opening) : end]
    return (None, text) if _TAG.search(inner) else (inner.strip(), text[end + len(closing) :])


def _search(said: str, thought: str, experts: Sequence[str]) -> Turn:
    found = [name for name in experts if said.startswith(f"{name}:")]
    if not found:
        return Turn("broken", "it asks nobody who is listed", thought)
    expert = max(found, key=len)
    sub_query = said[len(expert) + 1 :].strip()
    return (
        Turn("search", sub_query, thought, expert) if sub_query else Turn("broken", "the sub-query is empty", thought)
    )


def shown(turn: str) -> tuple[str, str]:
    """The thought and the answer of a turn that is still being written, as far as they are certain.

    Each is the beginning of what it will be: the end of `turn` is held back where it may be the beginning of a tag, or
    space before one.
    """
    text = turn.lstrip()
    if not text.startswith("<think>"):
        return "", ""
    thought, closed, rest = text.removeprefix("<think>").partition("</think>")
    if not closed:
        return _certain(thought), ""
    rest = rest.lstrip()
    if _TAG.search(thought) or not rest.startswith("<answer>"):
        return thought.strip(), ""
    answer = rest.removeprefix("<answer>").partition("</answer>")[0]
    return thought.strip(), _certain(answer)


def _certain(text: str) -> str:
    """`text` before what is, or may become, a tag of the protocol."""
    tag = _MAYBE_TAG.search(text)
    return (text[: tag.start()] if tag else text).strip()


def escape(text: str) -> str:
    """`text` with nothing in it that could be read as a tag of the protocol or of a chat template."""
    return _LIKE_A_TAG.sub("&lt;", text)


def information(reply: str, longest: int, *, last: bool) -> str:
    """An expert's reply as the policy reads it: in its tags, escaped, and cut to `longest` characters."""
    kept = escape(reply[:longest]).strip()
    return f"<information>{kept}</information>" + (f"\n{LAST_TURN}" if last else "")


def roster(cards: Sequence[ExpertCard]) -> str:
    """The experts as the policy reads them, one a line: what it is good at, USD per million output tokens, its name.

    The name comes last, so that a model that reads from left to right knows whose it is when it reads it.
    """
    return "\n".join(f"{_one_line(card.description)} ${card.output_price:.3g}: {card.name}" for card in cards)


def opening(cards: Sequence[ExpertCard], question: str, instructions: str = "") -> list[Message]:
    """The conversation before the policy's first turn."""
    system = f"{instructions.strip()}\n\n{roster(cards)}" if instructions else roster(cards)
    return [{"role": "system", "content": system}, {"role": "user", "content": escape(question).strip()}]


def _one_line(description: str) -> str:
    return escape(" ".join(description.split()))
