"""Tables of figures in the project's documents, made from the JSON files in docs/results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def fill_tables(document: str, table_of: Callable[[str], str | None]) -> str:
    """`document` with what stands between `<!-- NAME -->` and `<!-- end -->` exchanged for `table_of(NAME)`, if any."""

    def filled(found: re.Match[str]) -> str:
        table = table_of(found["name"])
        return found[0] if table is None else f"<!-- {found['name']} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w-]+) -->\n(?:(?!<!--).)*<!-- end -->", filled, document, flags=re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
