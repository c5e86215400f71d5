"""The experts of one encoder: where adapters come from, and what a large request does to those beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import orjson
import pytest
from huggingface_hub import constants

from experts.embedding.adapters import write_encoder
from experts.embedding.encoder import FloatArray, Tokens
from experts.embedding.expert import EmbeddingExpert, Runtime, build_encoder
from experts.errors import ExpertConfigError, ExpertUnavailableError
from experts.expert import ExpertRequest
from experts.fleet import Fleet

WAIT_S = 60.0
TEXT, MANY = "wing flow", ["wing flow noise"] * 1200


@pytest.fixture
async def experts(tiny: Path, loras: dict[str, Path]) -> AsyncIterator[dict[str, EmbeddingExpert]]:
    built = build(tiny, air=str(loras["air"]))
    yield built
    for expert in built.values():
        await expert.close()


def build(encoder: Path, **adapters: str | dict[str, str]) -> dict[str, EmbeddingExpert]:
    """A fleet of an encoder, for which at most 1,500 texts may wait, and adapters by their paths, or more."""
    entries: list[dict[str, object]] = [{"name": "search", "encoder": {"model": str(encoder), "max_queue": 1500}}]
    for name, path in adapters.items():
        source = path if isinstance(path, dict) else {"path": path}
        entries.append({"name": name, "adapter": {"base": "search", **source}})
    return build_encoder(Fleet.model_validate({"experts": entries}).groups[0])  # type: ignore[return-value]


@pytest.fixture
def hub(tmp_path: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was once fetched from the hub: `us/adapter`, of which `main` is one adapter, and `new` another."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, name in (("main", "air"), ("new", "med")):
        folder = tmp_path / "models--us--adapter"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(name * 10)
        (folder / "snapshots").mkdir(exist_ok=True)
        (folder / "snapshots" / (name * 10)).symlink_to(loras[name])


async def vector(expert: EmbeddingExpert) -> list[float]:
    part = await expert.embed(ExpertRequest(id="e", endpoint="embeddings", body={"input": TEXT}))
    found: list[float] = orjson.loads(part.data)["data"][0]["embedding"]
    return found


@pytest.mark.usefixtures("hub")
async def test_adapters_come_from_folders_urls_and_the_hub(tiny: Path, loras: dict[str, Path]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(loras["med"]), "/encoders/med", recursive=True)
    built = build(
        tiny,
        air=str(loras["air"]),
        med=str(loras["med"]),
        far="memory://encoders/med",
        main="us/adapter",
        new={"path": "us/adapter", "revision": "new"},
    )
    assert await vector(built["main"]) == await vector(built["air"])
    assert await vector(built["new"]) == await vector(built["far"]) == await vector(built["med"])
    assert await vector(built["air"]) != await vector(built["med"])
    await built["search"].load_adapter("main", "us/adapter", "new")
    assert await vector(built["main"]) == await vector(built["med"])
    await built["search"].load_adapter("main", "memory://encoders/med")
    assert await vector(built["main"]) == await vector(built["med"])
    for expert in built.values():
        await expert.close()


@pytest.mark.usefixtures("hub")
async def test_what_cannot_be_had_is_refused(
    experts: dict[str, EmbeddingExpert], loras: dict[str, Path], tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(loras["med"]), "/encoders/other", recursive=True)
    write_encoder(tmp_path, "0" * 64)
    memory.put(str(tmp_path / "encoder.json"), "/encoders/other/encoder.json")
    for path, revision, said in (
        ("us/nothing", None, "adapter 'new': it cannot be had from the hub"),
        ("us/adapter", "gone", "adapter 'new': it cannot be had from the hub"),
        ("memory://encoders/nothing", None, "adapter 'new': there is no adapter at"),
        ("memory://encoders/other", None, "adapter 'new': it was trained on the encoder 000000000000"),
        (str(loras["med"]), "main", "adapter 'new': revision 'main' is for a name on the hub"),
        ("memory://encoders/med", "main", "adapter 'new': revision 'main' is for a name on the hub"),
        ("/nowhere", None, "adapter 'new': there is no folder '/nowhere'"),
    ):
        with pytest.raises(ExpertConfigError, match=said):
            await experts["search"].load_adapter("new", path, revision)
    assert runtime_of(experts).encoder.names == ["air"]


async def test_requests_go_on_while_an_adapter_is_fetched(
    experts: dict[str, EmbeddingExpert], loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = threading.Event()

    @contextmanager
    def slow(path: str, revision: str | None) -> Iterator[Path]:
        fetched.wait(WAIT_S)
        yield Path(path)

    monkeypatch.setattr("experts.embedding.expert.local_copy", slow)
    loading = asyncio.create_task(experts["search"].load_adapter("med", str(loras["med"])))
    async with asyncio.timeout(WAIT_S / 2):
        await vector(experts["air"])
    assert not loading.done()
    fetched.set()
    await loading
    assert runtime_of(experts).encoder.names == ["air", "med"]


def runtime_of(experts: dict[str, EmbeddingExpert]) -> Runtime:
    return experts["search"]._shared.resource


class Gate:
    """Holds an encoder before its first batch, until it is opened, and counts the texts of each batch."""

    def __init__(self, experts: dict[str, EmbeddingExpert], monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.reached, self.open = threading.Event(), threading.Event()
        self._encode = runtime_of(experts).encoder.encode
        monkeypatch.setattr(runtime_of(experts).encoder, "encode", self.encode)

    def encode(self, tokens: Tokens, adapters: list[str | None]) -> FloatArray:
        self.batches.append(len(tokens))
        self.reached.set()
        self.open.wait(WAIT_S)
        return self._encode(tokens, adapters)


async def test_a_large_request_lets_small_ones_come_between(
    experts: dict[str, EmbeddingExpert], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(experts)
    expected, _ = await runtime.encode([TEXT], "air")
    gate = Gate(experts, monkeypatch)
    texts = [*MANY[:-1], TEXT]
    large = asyncio.create_task(runtime.encode(texts, "air"))
    await asyncio.to_thread(gate.reached.wait, WAIT_S)
    small = asyncio.create_task(runtime.encode([TEXT], None))
    with pytest.raises(ExpertUnavailableError, match="1500 texts wait"):
        await runtime.encode(["wing"] * 301, None)
    gate.open.set()
    vectors, tokens = await large
    await small
    assert gate.batches == [512, 1, 512, 176]
    assert tokens == 1199 * 5 + 4
    assert len(vectors) == 1200
    np.testing.assert_allclose(vectors[-1], expected[0], atol=2e-6)
    assert abs(vectors[-1] - vectors[0]).max() > 0.01


async def test_a_request_that_nobody_waits_for_ends_after_its_slice(
    experts: dict[str, EmbeddingExpert], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, runtime = Gate(experts, monkeypatch), runtime_of(experts)
    large = asyncio.create_task(runtime.encode(MANY, None))
    await asyncio.to_thread(gate.reached.wait, WAIT_S)
    waiting = asyncio.create_task(runtime.encode(MANY[:300], None))
    await asyncio.sleep(0)
    for task in (large, waiting):
        task.cancel()
    await asyncio.gather(large, waiting, return_exceptions=True)
    next_one = asyncio.create_task(runtime.encode(MANY[:1000], None))  # there is room for it again
    await asyncio.sleep(0)
    gate.open.set()
    await next_one
    assert gate.batches == [512, 512, 488]


async def test_an_adapter_is_unloaded_after_all_of_a_large_request(
    experts: dict[str, EmbeddingExpert], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, runtime = Gate(experts, monkeypatch), runtime_of(experts)
    large = asyncio.create_task(runtime.encode(MANY, "air"))
    await asyncio.to_thread(gate.reached.wait, WAIT_S)
    unloading = asyncio.create_task(experts["search"].unload_adapter("air"))
    await asyncio.sleep(0)
    gate.open.set()
    vectors, _ = await large
    await unloading
    assert len(vectors) == len(MANY)
    assert not await experts["air"].healthy()
    with pytest.raises(ExpertConfigError, match="no adapter 'air' is loaded"):
        await experts["search"].unload_adapter("air")
