"""The requests that vLLM gets and what becomes of its outputs, against a stand-in with vLLM's names.

vLLM itself needs a GPU: what is tested here is the translation, not vLLM.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experts.build import build_group
from experts.errors import ExpertConfigError, ExpertRequestError, ExpertUnavailableError
from experts.expert import Expert
from experts.fleet import ExpertGroup, FleetEntry
from experts.local.expert import LocalExpert
from tests.experts.asking import answer, ask, run, text_of
from tests.experts.models import save_adapter


@dataclass
class Completion:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: Any = None


@dataclass
class Output:
    outputs: list[Completion]


@dataclass
class Likely:
    logprob: float


@dataclass
class StandInEngine:
    """Answers `ab` to everything, in two steps, and keeps what it was asked."""

    arguments: Any = None
    asked: list[Any] = field(default_factory=list)
    error: Exception | None = None

    async def generate(self, prompt: Any, params: Any, request_id: str, lora_request: Any) -> AsyncIterator[Output]:
        self.asked.append((prompt, params, lora_request))
        if self.error:
            raise self.error
        for i, letter in enumerate("ab"):
            await asyncio.sleep(0)
            likely = [{65: Likely(-1.0), 97 + i: Likely(-0.5)}]
            reason = "length" if i else None
            yield Output([Completion(j, letter, [97 + i], reason, likely) for j in range(params["n"])])

    def shutdown(self) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandInEngine:
    made = StandInEngine()

    def from_engine_args(arguments: Any) -> StandInEngine:
        made.arguments = arguments
        return made

    vllm, parameters, requests = ModuleType("vllm"), ModuleType("vllm.sampling_params"), ModuleType("vllm.lora.request")
    vllm.AsyncEngineArgs = dict  # type: ignore[attr-defined]
    vllm.AsyncLLMEngine = type("E", (), {"from_engine_args": staticmethod(from_engine_args)})  # type: ignore[attr-defined]
    vllm.SamplingParams = dict  # type: ignore[attr-defined]
    parameters.RequestOutputKind = type("K", (), {"DELTA": "delta"})  # type: ignore[attr-defined]
    requests.LoRARequest = lambda *values: values  # type: ignore[attr-defined]
    for name, module in (
        ("vllm", vllm),
        ("vllm.sampling_params", parameters),
        ("vllm.lora", ModuleType("vllm.lora")),
        ("vllm.lora.request", requests),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def build(model: Path, *adapters: Path, **source: Any) -> dict[str, Expert]:
    entry = {"context_length": 512, "features": ["logprobs"]}
    head = FleetEntry(name="m", local={"model": str(model), "engine": "vllm", **source}, **entry)
    entries = [FleetEntry(name=path.name, adapter={"base": "m", "path": str(path)}, **entry) for path in adapters]
    return build_group(ExpertGroup(head=head, adapters=tuple(entries)))


def test_without_vllm_it_is_said(llama: Path) -> None:
    with pytest.raises(ExpertConfigError, match="the package vllm is not installed"):
        build(llama)


async def test_a_request_reaches_vllm_and_its_outputs_come_back(
    engine: StandInEngine, llama: Path, adapters: list[Path]
) -> None:
    experts = build(llama, *adapters, max_batch=7, max_adapters=3)
    assert {"max_num_seqs": 7, "max_loras": 3, "max_model_len": 512}.items() <= engine.arguments.items()
    reply = await answer(experts["one"], ask(n=2, seed=3, top_p=0.0, stop=["x"], logprobs=True, top_logprobs=1))
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["ab", "ab"]
    assert reply["usage"]["completion_tokens"] == 4
    told = reply["choices"][0]["logprobs"]["content"][1]
    assert (told["token"], told["logprob"]) == (told["top_logprobs"][0]["token"], -0.5)
    [(prompt, params, lora)] = engine.asked
    assert len(prompt["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    assert {"n": 2, "seed": 3, "stop": ["x"], "max_tokens": 12, "logprobs": 1}.items() <= params.items()
    assert params["top_p"] > 0
    assert lora == ("one", 1, str(adapters[0]))
    assert await text_of(experts["m"], ask(endpoint="completions", prompt=["p", "q"])) == "ab"
    for expert in experts.values():
        await expert.close()
    assert not await experts["m"].healthy()


async def test_room_is_counted_by_answers(engine: StandInEngine, llama: Path) -> None:
    [expert] = build(llama, max_batch=7, max_queue=1).values()
    seven = asyncio.create_task(run(expert, ask(endpoint="completions", prompt=["p"] * 7)))
    while not engine.asked:  # noqa: ASYNC110  # it is over before a slower way of waiting would see it
        await asyncio.sleep(0)
    runs: Any = expert
    assert len(runs._engine._under_way) == 7
    runs._engine.check_room("")
    [part] = await seven
    assert part.work
    assert part.work.batch_size > 1
    assert (part.work.queue_s, part.work.cache_use) == (None, None)
    await expert.close()


async def test_adapters_are_checked_before_vllm_is_asked_for_them(
    engine: StandInEngine, llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    experts = build(llama, adapters[0])
    base = experts["m"]
    assert isinstance(base, LocalExpert)
    (tmp_path / "wide").mkdir()
    for folder, complaint in (
        (tmp_path, "adapter_config"),
        (save_adapter(llama, tmp_path / "wide", r=65), "rank is 65"),
    ):
        with pytest.raises(ExpertConfigError, match=complaint):
            await base.load_adapter("new", str(folder))
    await base.load_adapter("new", str(adapters[1]))
    assert await text_of(base, ask(model="m+new")) == "ab"
    with pytest.raises(ExpertConfigError, match=r"expert 'wide': adapter .*rank is 65"):
        build(llama, tmp_path / "wide")
    bare = build(llama)["m"]
    assert isinstance(bare, LocalExpert)
    with pytest.raises(ExpertConfigError, match="at its start only"):
        await bare.load_adapter("new", str(adapters[1]))
    for expert in (*experts.values(), bare):
        await expert.close()


async def test_what_vllm_cannot_do_and_what_fails_is_said(
    engine: StandInEngine, llama: Path, adapters: list[Path]
) -> None:
    experts = build(llama, *adapters)
    assert await text_of(experts["m"], ask(model="m+one")) == "ab"
    for model, status in (("m+one:0.5", 400), ("m+one+two", 400), ("m+gate:g", 400), ("m+nobody", 404)):
        with pytest.raises(ExpertRequestError) as caught:
            await run(experts["m"], ask(model=model))
        assert caught.value.status == status, model
    engine.error = KeyError("gone")
    with pytest.raises(ExpertUnavailableError, match="gone"):
        await run(experts["m"], ask())
    entry = FleetEntry(name="mix", mixture={"base": "m", "adapters": {"one": 1.0}})
    head = FleetEntry(name="m", local={"model": str(llama), "engine": "vllm"})
    with pytest.raises(ExpertConfigError, match="mixtures need"):
        build_group(ExpertGroup(head=head, adapters=(entry,)))
    for expert in experts.values():
        await expert.close()
