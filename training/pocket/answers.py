"""What members of the fleet answer, kept by weights and questions: one that has not changed is not asked again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from training.pocket.fleet import Member
from training.pocket.generate import MAX_NEW_TOKENS, Response, respond
from training.pocket.tokens import build_tokenizer


def answers(member: Member, queries: Sequence[str], kept: Path | None) -> list[Response]:
    """The member's most likely answers, in the order of the queries; from ``kept`` where they are there already."""
    if kept is None:
        return respond(member.load(), build_tokenizer(), queries)
    path = kept / "answers" / f"{_key(member, queries)}.json"
    if path.exists():
        return [Response(**answer) for answer in json.loads(path.read_text())]
    found = respond(member.load(), build_tokenizer(), queries)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(answer) for answer in found]))
    partial.replace(path)
    return found


def _key(member: Member, queries: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([MAX_NEW_TOKENS, list(queries)]).encode())
    digest.update((member.model_folder / "model.safetensors").read_bytes())
    if member.adapter_folder is not None:
        digest.update((member.adapter_folder / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()[:24]
