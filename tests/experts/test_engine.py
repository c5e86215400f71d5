"""The engine's turns: what fails in one harms nobody else, and loading adapters does not stop them."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.build import build_group
from experts.errors import ExpertUnavailableError
from experts.expert import Work
from experts.fleet import ExpertGroup, FleetEntry
from experts.local import registry
from experts.local.batch import Batch
from experts.local.cache import SlotCache
from experts.local.expert import LocalExpert
from experts.local.pool import Adapter, AdapterPool
from experts.local.row import Pace
from experts.local.sites import Site
from tests.experts.asking import ENDLESS, ask, run, text_of, until

MANY = 12


@pytest.fixture
async def base(llama: Path, adapters: list[Path]) -> AsyncIterator[LocalExpert]:
    """A base `m` with as many adapters `a0`, `a1` ... as it has slots, none of them on the device."""
    source = {"model": str(llama), "max_adapters": MANY}
    [expert] = build_group(ExpertGroup(head=FleetEntry(name="m", context_length=512, local=source))).values()
    assert isinstance(expert, LocalExpert)
    for i in range(MANY):
        await expert.load_adapter(f"a{i}", str(adapters[i % len(adapters)]))
    yield expert
    await expert.close()


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("no memory")


async def growing(base: LocalExpert, **body: Any) -> asyncio.Task[str]:
    """An answer that grows meanwhile."""
    task = asyncio.create_task(text_of(base, ask(**{**ENDLESS, **body})))
    await until(lambda: any(not row.finished for steps in engine(base)._growing() for row in steps.rows))
    return task


def engine(base: LocalExpert) -> Any:
    return base._engine


def adapter_of(base: LocalExpert, name: str) -> Adapter:
    registered: Any = base._registry
    adapter: Adapter = registered._adapters[name]
    return adapter


@pytest.mark.parametrize(("owner", "name"), [(SlotCache, "reserve"), (SlotCache, "read_in"), (Site, "write")])
async def test_who_finds_no_memory_as_it_begins_fails_alone(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    short = {**ENDLESS, "max_tokens": 200}  # it stays where it begins
    expected = await text_of(base, ask(**short))
    as_a0 = await text_of(base, ask(model="m+a0"))
    other = await growing(base, **short)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, no_memory)
        with pytest.raises(ExpertUnavailableError, match="failed while it generated"):
            await run(base, ask(model="m+a1"))
    assert await other == expected
    assert await text_of(base, ask(model="m+a0")) == as_a0
    assert await base.healthy()
    await until(lambda: not engine(base)._model.pool._pins)


async def test_who_finds_no_memory_to_grow_longer_fails_alone(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await text_of(base, ask("x" * 300))
    monkeypatch.setattr(Batch, "pull", no_memory)
    long = await growing(base, model="m+a0")
    assert await text_of(base, ask("x" * 300)) == expected
    with pytest.raises(ExpertUnavailableError, match="failed while it generated"):
        await long
    await until(lambda: not engine(base)._rows())
    await until(lambda: not engine(base)._model.pool._pins)
    assert await base.healthy()


async def test_an_error_of_any_kind_ends_no_engine(base: LocalExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Batch) -> None:
        raise KeyError("what no step should raise")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", fail)
        with pytest.raises(ExpertUnavailableError):
            await run(base, ask())
    assert await text_of(base, ask())


async def test_a_lost_device_ends_the_engine_and_answers_everybody(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr("experts.local.engine.read_together", lose)
    replies = await asyncio.gather(*(run(base, ask(timeout_s=5)) for _ in range(3)), return_exceptions=True)
    assert [type(reply) for reply in replies] == [ExpertUnavailableError] * 3
    assert not await base.healthy()


async def test_adapters_are_copied_a_few_at_a_time_between_two_steps(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All missing ones at once would fit: what holds them back is that others grow."""
    copied: Counter[int] = Counter()
    load = AdapterPool._load

    def noting_load(self: AdapterPool, adapter: Adapter) -> None:
        copied[engine(base)._steps] += 1
        load(self, adapter)

    expected = await text_of(base, ask(**ENDLESS))
    other = await growing(base)
    monkeypatch.setattr(AdapterPool, "_load", noting_load)
    await asyncio.gather(*(run(base, ask(model=f"m+a{i}", max_tokens=1)) for i in range(MANY)))
    assert not other.done()
    assert sum(copied.values()) == MANY
    assert max(copied.values()) <= 4
    assert await other == expected


async def test_answers_that_outgrow_their_place_together_move_one_after_the_other(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: Counter[int] = Counter()
    pull = Batch.pull

    def noting_pull(self: Batch, *args: Any) -> None:
        moved[engine(base)._steps] += 1
        pull(self, *args)

    requests = [ask("x", model=f"m+a{i}", **ENDLESS) for i in range(8)]
    expected = [await text_of(base, request) for request in requests]
    monkeypatch.setattr(Batch, "pull", noting_pull)
    assert await asyncio.gather(*(text_of(base, request) for request in requests)) == expected
    assert sum(moved.values()) == 8
    assert max(moved.values()) == 1


async def test_steps_go_on_while_an_adapter_is_registered(
    base: LocalExpert, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one waits until the engine has made many steps meanwhile: it would wait for ever if they stopped."""
    stepped = threading.Event()
    read = registry.read_adapter
    began: list[int] = []

    def slow_read(*args: Any) -> Any:
        began.append(engine(base)._steps)
        if not stepped.wait(10):
            raise AssertionError("the engine made no steps")
        return read(*args)

    monkeypatch.setattr(registry, "read_adapter", slow_read)
    other = await growing(base)
    loading = asyncio.create_task(base.load_adapter("new", str(adapters[0])))
    await until(lambda: began and engine(base)._steps >= began[0] + 20)
    stepped.set()
    await loading
    assert await text_of(base, ask(model="m+new")) == await text_of(base, ask(model="m+a0"))
    assert await other


async def test_nobody_waits_at_the_door_while_an_adapter_is_copied(
    base: LocalExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, go_on = threading.Event(), threading.Event()
    load = AdapterPool._load

    def slow_load(self: AdapterPool, adapter: Adapter) -> None:
        copying.set()
        go_on.wait(10)
        load(self, adapter)

    monkeypatch.setattr(AdapterPool, "_load", slow_load)
    asked = asyncio.create_task(text_of(base, ask(model="m+a0")))
    await until(copying.is_set)
    locked = engine(base)._changed.acquire(blocking=False)
    if locked:
        engine(base)._changed.release()
    go_on.set()
    assert locked
    assert await asked


async def test_a_forgotten_adapter_is_freed_though_nobody_asks_for_anything(
    base: LocalExpert, adapters: list[Path]
) -> None:
    old = [weakref.ref(next(iter(adapter_of(base, f"a{i}").parts.values())).a) for i in range(2)]
    await run(base, ask(model="m+a0"))
    await base.load_adapter("a0", str(adapters[1]))
    await base.unload_adapter("a1")

    def freed() -> bool:
        gc.collect()
        return all(one() is None for one in old)

    await until(freed)


async def test_the_speed_of_an_answer_counts_what_came_after_its_first_token(base: LocalExpert) -> None:
    [one] = await run(base, ask(max_tokens=1, ignore_eos=True))
    assert one.work
    assert one.work.tokens_per_s is None
    pace = Pace(submitted=0.0, admitted=0.5, first_token=1.0, ended=3.0, steps=4, rows=10, cache_use=0.5)
    assert pace.work(8) == Work(0.5, 1.0, 4.0, 2.5, 0.5, 0, 0)
    [two] = await run(base, ask(max_tokens=9, ignore_eos=True, n=2))
    assert two.work
    assert two.work.tokens_per_s
