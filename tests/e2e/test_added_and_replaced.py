"""Adapters of a local model that are added to the real service, replaced and removed, while it answers others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from experts.fleet import POCKET_FLEET, load_fleet
from tests.e2e.conftest import LOCAL, Stack

pytestmark = pytest.mark.slow

NAME = "added"


def adapters() -> list[tuple[str, str]]:
    """The first two adapters of the pocket fleet, with their folders."""
    [group] = [group for group in load_fleet(POCKET_FLEET).groups if group.name == LOCAL]
    return [(entry.name, entry.adapter.path) for entry in group.adapters if entry.adapter][:2]


def text_of(stack: Stack, model: str) -> str:
    response = stack.chat(model, "What is 17 + 25?", temperature=0)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def add(stack: Stack, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"name": NAME, "base": LOCAL, "path": path, "context_length": 512, **fields}
    response = stack.http.post("/v1/adapters", json=body)
    return response.status_code, response.json()


@contextmanager
def others_asking(stack: Stack) -> Iterator[list[str]]:
    """Two clients that ask the base and an adapter all the while; what they were answered."""
    answers: list[str] = []
    done = threading.Event()

    def ask(model: str) -> None:
        while not done.is_set():
            response = stack.chat(model, "What is 17 + 25?", temperature=0)
            answers.append(f"{model}: {response.status_code} {response.json().get('choices')}")

    threads = [threading.Thread(target=ask, args=(model,)) for model in (LOCAL, adapters()[0][0])]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_an_adapter_is_added_replaced_and_removed_while_others_are_answered(stack: Stack) -> None:
    (one, one_path), (two, two_path) = adapters()
    as_one, as_two = text_of(stack, one), text_of(stack, two)
    assert as_one != as_two
    assert stack.chat(NAME).status_code == 404
    try:
        with others_asking(stack) as answers:
            status, added = add(stack, one_path, description="Sums.")
            assert (status, added["expert"]["kind"], added["expert"]["description"]) == (201, "adapter", "Sums.")
            assert text_of(stack, NAME) == text_of(stack, f"{LOCAL}+{NAME}:1") == as_one
            assert add(stack, two_path)[0] == 409
            status, refused = add(stack, "/nowhere", replace=True)
            assert (status, "no folder" in refused["error"]["message"]) == (400, True)
            assert text_of(stack, NAME) == as_one
            assert add(stack, two_path, replace=True)[0] == 201
            assert text_of(stack, NAME) == as_two
            assert NAME in {model["id"] for model in stack.http.get("/v1/models").json()["data"]}
    finally:
        gone = stack.http.delete(f"/v1/adapters/{NAME}")
    assert gone.json() == {"object": "adapter", "name": NAME, "deleted": True}
    assert stack.chat(NAME).status_code == 404
    assert text_of(stack, one) == as_one
    assert answers
    assert len(set(answers)) == 2  # each was answered the same, whatever happened beside it
