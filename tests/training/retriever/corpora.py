"""Tiny collections in BEIR's layout, made of the words that the tiny encoder knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

DOMAINS = {"air": ["wing", "flow", "shock", "noise"], "med": ["blood", "cell", "lung", "the"], "cs": ["code", "loop"]}


def save_corpus(folder: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Documents of three sentences each of the domain's words, and one judged test query."""
    rng = np.random.default_rng(seed)
    words = [*DOMAINS[folder.name], "of", "in", "radio", "wave"]
    folder.mkdir(parents=True)

    def sentence() -> str:
        return " ".join(rng.choice(words, 5)) + "."

    rows = [{"_id": str(i), "title": "", "text": " ".join(sentence() for _ in range(3))} for i in range(documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "the judged query"}) + "\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\nq\t4\t0\n")
    return folder


def save_judged(folder: Path, queries: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """The same with judged training queries beside the test's: by id, their text and the documents that answer it."""
    save_corpus(folder)
    (folder / "qrels").mkdir()
    lines = [f"{query}\t{document}\t1\n" for query, (_, documents) in queries.items() for document in documents]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    rows = [{"_id": query, "text": text} for query, (text, _) in queries.items() if query != "q"]
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder
