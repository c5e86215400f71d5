"""Local experts end to end, on tiny random models of real architectures."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.build import build_group
from experts.errors import (
    ExpertConfigError,
    ExpertRequestError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.expert import Endpoint, Expert, ExpertRequest
from experts.fleet import ExpertGroup, FleetEntry
from experts.local.batch import Batch
from experts.local.expert import LocalExpert
from tests.experts.asking import ENDLESS, TEXT, answer, ask, run, text_of, until
from tests.experts.models import save_adapter, save_model

Fleet = dict[str, Expert]


async def chunks(expert: Expert, request: ExpertRequest) -> list[dict[str, Any]]:
    return [orjson.loads(part.data) for part in await run(expert, request) if part.data]


async def refused(expert: Expert, request: ExpertRequest) -> ExpertRequestError:
    with pytest.raises(ExpertRequestError) as caught:
        await run(expert, request)
    return caught.value


def build(model: Path, *adapters: Path, context_length: int = 512, **source: Any) -> Fleet:
    head = FleetEntry(name="m", context_length=context_length, local={"model": str(model), **source})
    entries = [
        FleetEntry(name=path.name, context_length=context_length, adapter={"base": "m", "path": str(path)})
        for path in adapters
    ]
    return build_group(ExpertGroup(head=head, adapters=tuple(entries)))


async def test_a_greedy_answer_is_transformers_own(fleet: Fleet, llama: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    messages = [{"role": "user", "content": TEXT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    reply = await answer(fleet["base"], ask())
    assert reply["choices"][0]["message"]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert reply["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]


async def test_the_shape_of_an_answer(fleet: Fleet) -> None:
    reply = await answer(fleet["one"], ask())
    content = reply["choices"][0]["message"].pop("content")
    assert isinstance(content, str)
    assert abs(reply.pop("created") - time.time()) < 60
    assert reply.pop("usage").keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert reply == {
        "id": "req-1",
        "object": "chat.completion",
        "model": "one",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": reply["choices"][0]["finish_reason"],
            }
        ],
    }


async def test_a_stream_is_the_answer_in_openais_chunks(fleet: Fleet) -> None:
    whole = await answer(fleet["base"], ask())
    stream = await chunks(fleet["base"], ask(stream=True, stream_options={"include_usage": True}))
    deltas = [one["choices"][0]["delta"] for one in stream[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    reasons = [one["choices"][0]["finish_reason"] for one in stream[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole["choices"][0]["finish_reason"]]
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == whole["usage"]
    assert all(one["usage"] is None for one in stream[:-1])
    assert {(one["id"], one["object"], one["model"]) for one in stream} == {("req-1", "chat.completion.chunk", "base")}


async def test_usage_comes_last_and_unseen_if_it_was_not_asked_for(fleet: Fleet) -> None:
    parts = await run(fleet["base"], ask(stream=True))
    assert parts[-1].data == b""
    assert parts[-1].usage is not None
    assert all(part.usage is None and "usage" not in orjson.loads(part.data) for part in parts[:-1])


async def test_completions(fleet: Fleet) -> None:
    reply = await answer(fleet["base"], ask(endpoint="completions"))
    assert reply["object"] == "text_completion"
    text = reply["choices"][0]["text"]
    stream = await chunks(fleet["base"], ask(endpoint="completions", stream=True))
    assert "".join(one["choices"][0]["text"] for one in stream) == text


async def test_several_prompts_and_several_answers(fleet: Fleet) -> None:
    request = ask(endpoint="completions", prompt=["first", "second"], n=2)
    reply = await answer(fleet["base"], request)
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == await text_of(fleet["base"], ask("first", endpoint="completions"))
    assert texts[2] == texts[3] == await text_of(fleet["base"], ask("second", endpoint="completions"))


async def test_a_prompt_of_tokens(fleet: Fleet, llama: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(llama)(TEXT)["input_ids"]
    expected = await text_of(fleet["base"], ask(endpoint="completions"))
    assert await text_of(fleet["base"], ask(endpoint="completions", prompt=tokens)) == expected


async def test_sampled_answers_differ_but_for_their_seed(fleet: Fleet) -> None:
    hot = {"temperature": 1.5, "max_tokens": 20}
    seeded = [await text_of(fleet["base"], ask(seed=7, **hot)) for _ in range(2)]
    assert seeded[0] == seeded[1] != await text_of(fleet["base"], ask(seed=8, **hot))
    assert await text_of(fleet["base"], ask(**hot)) != await text_of(fleet["base"], ask(**hot))
    choices = (await answer(fleet["base"], ask(seed=7, n=3, **hot)))["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert choices[0]["message"]["content"] == seeded[0]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.00001}])
async def test_a_nucleus_of_one_is_greedy(fleet: Fleet, options: dict[str, Any]) -> None:
    request = ask(**{"temperature": 1.0, "seed": 1, **options})
    assert await text_of(fleet["base"], request) == await text_of(fleet["base"], ask())


async def test_an_answer_is_the_same_alone_and_among_others(fleet: Fleet) -> None:
    requests = [
        (name, ask(f"question {i} " * i, temperature=float(i % 2), seed=i, max_tokens=5 + 3 * i))
        for i, name in enumerate([*fleet] * 2, start=1)
    ]
    alone = [await text_of(fleet[name], request) for name, request in requests]
    together = await asyncio.gather(*(text_of(fleet[name], request) for name, request in requests))
    assert together == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gpt2", "bloom"])
async def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    """Mistral has sliding windows, whose caches cannot be shared; GPT-2 has no rotary positions, Bloom none at all."""
    model = save_model(tmp_path / "model", architecture)
    adapters = [] if architecture in ("gpt2", "bloom") else [save_adapter(model, tmp_path / "adapter")]
    experts = build(model, *adapters)
    requests = [(expert, ask("word " * i, max_tokens=20, n=2)) for i in (1, 9) for expert in experts.values()]
    alone = [await text_of(expert, request) for expert, request in requests]
    assert await asyncio.gather(*(text_of(expert, request) for expert, request in requests)) == alone
    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    inputs = tokenizer(f"<|user|>{'word ' * 9}<|end|><|assistant|>", return_tensors="pt", return_token_type_ids=False)
    tokens = reference.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert alone[len(experts)] == tokenizer.decode(tokens, skip_special_tokens=True)
    for expert in experts.values():
        await expert.close()


async def test_long_prompts_are_read_in_pieces(fleet: Fleet, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await text_of(fleet["two"], ask("long " * 60))
    monkeypatch.setattr("experts.local.batch.PREFILL_CHUNK", 7)
    assert await text_of(fleet["two"], ask("long " * 60)) == whole


async def test_stop_strings_end_the_answer_and_are_not_in_it(fleet: Fleet) -> None:
    text = await text_of(fleet["base"], ask(max_tokens=40))
    stop = text[6:9]
    reply = await answer(fleet["base"], ask(max_tokens=40, stop=["never there", stop]))
    assert reply["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    stream = await chunks(fleet["base"], ask(max_tokens=40, stop=stop, stream=True))
    deltas = [one["choices"][0]["delta"].get("content", "") for one in stream]
    assert "".join(deltas) == text[: text.index(stop)]


async def test_max_tokens_and_the_context_end_the_answer(fleet: Fleet) -> None:
    bias = {"logit_bias": {str(token): -100 for token in range(256, 260)}}
    for limits in ({"max_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        reply = await answer(fleet["base"], ask(**limits, **bias))
        assert reply["usage"]["completion_tokens"] == 3
        assert reply["choices"][0]["finish_reason"] == "length"
    reply = await answer(fleet["base"], ask("x" * 500, max_tokens=400, **bias))
    assert reply["usage"]["total_tokens"] == 512


async def test_the_end_token_ends_the_answer(fleet: Fleet) -> None:
    reply = await answer(fleet["base"], ask(logit_bias={"256": 100}))
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"]["completion_tokens"] == 0


async def test_logit_bias_and_penalties(fleet: Fleet) -> None:
    always = {"logit_bias": {"65": 100}, "max_tokens": 6, "temperature": 0}
    text = await text_of(fleet["base"], ask(**always))
    assert len(set(text)) == 1
    bias = {"logit_bias": {str(token): 50 for token in range(32, 42)}, "max_tokens": 10}
    free = await text_of(fleet["base"], ask(**bias))
    tired = await text_of(fleet["base"], ask(**bias, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(tired)) > len(set(free))


async def test_logprobs_of_a_chat(fleet: Fleet) -> None:
    request = ask(logprobs=True, top_logprobs=3, max_tokens=5)
    content = (await answer(fleet["base"], request))["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert len(token["top_logprobs"]) == 3
    stream = await chunks(fleet["base"], ask(logprobs=True, top_logprobs=3, max_tokens=5, stream=True))
    streamed = [one for chunk in stream for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content


async def test_logprobs_of_a_completion(fleet: Fleet) -> None:
    request = ask(endpoint="completions", logprobs=2, max_tokens=4)
    logprobs = (await answer(fleet["base"], request))["choices"][0]["logprobs"]
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 4
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 5}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_bad_parameters_are_named(fleet: Fleet, body: dict[str, Any], param: str) -> None:
    error = await refused(fleet["base"], ask(**body))
    assert (error.status, error.param) == (400, param)
    assert error.code


@pytest.mark.parametrize("prompt", [None, 5, "", [], [[]], ["a", ""], [-1], [99999], [1, "a"]])
async def test_bad_prompts_are_refused(fleet: Fleet, prompt: object) -> None:
    assert (await refused(fleet["base"], ask(endpoint="completions", prompt=prompt))).param == "prompt"


async def test_unknown_fields_text_parts_and_null_content_are_fine(fleet: Fleet) -> None:
    parts = [{"type": "text", "text": TEXT[:5]}, {"type": "text", "text": TEXT[5:]}]
    odd = ask(messages=[{"role": "user", "content": parts}], user="me", never_heard_of={"a": None}, tools=[])
    assert await text_of(fleet["base"], odd) == await text_of(fleet["base"], ask())
    null = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    assert await text_of(fleet["base"], ask(messages=null, temperature=None, stop=None)) is not None


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
async def test_a_prompt_beyond_the_context_is_refused(fleet: Fleet, endpoint: Endpoint) -> None:
    error = await refused(fleet["base"], ask("x" * 600, endpoint=endpoint))
    assert error.code == "context_length_exceeded"
    assert "512" in str(error)


async def test_logprobs_need_the_feature(llama: Path) -> None:
    experts = build(llama)
    assert (await refused(experts["m"], ask(logprobs=True))).param == "logprobs"
    await experts["m"].close()


async def test_it_makes_no_embeddings(fleet: Fleet) -> None:
    with pytest.raises(ExpertRequestError):
        await fleet["base"].embed(ask(endpoint="embeddings"))


def engine_of(expert: Expert) -> Any:
    assert isinstance(expert, LocalExpert)
    return expert._engine


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each step take at least 10 ms."""
    step = Batch.step

    def slow_step(self: Batch) -> None:
        time.sleep(0.01)
        step(self)

    monkeypatch.setattr(Batch, "step", slow_step)


@pytest.mark.usefixtures("slow")
async def test_closing_the_iterator_stops_the_generation(fleet: Fleet) -> None:
    stream = fleet["one"].generate(ask(stream=True, **ENDLESS))
    await anext(stream)
    await until(lambda: engine_of(fleet["one"])._rows())
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: not engine_of(fleet["one"])._rows())


@pytest.mark.usefixtures("slow")
async def test_the_deadline_holds_and_frees_the_row(fleet: Fleet) -> None:
    began = time.monotonic()
    with pytest.raises(ExpertTimeoutError):
        await run(fleet["one"], ask(timeout_s=0.2, **ENDLESS))
    assert time.monotonic() - began < 2
    await until(lambda: not engine_of(fleet["one"])._rows())


@pytest.mark.usefixtures("slow")
async def test_the_loop_stays_free_and_first_tokens_come_before_others_end(fleet: Fleet) -> None:
    streams = [fleet[name].generate(ask(stream=True, **ENDLESS)) for name in fleet]
    first = await asyncio.gather(*(anext(stream) for stream in streams))
    assert len(first) == 4
    ticks = 0
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("slow")
async def test_a_full_queue_refuses(llama: Path) -> None:
    experts = build(llama, max_batch=1, max_queue=1)
    running = asyncio.create_task(run(experts["m"], ask(**ENDLESS)))
    await until(lambda: engine_of(experts["m"])._rows())
    await until(lambda: engine_of(experts["m"])._free == 0)
    waiting = asyncio.create_task(run(experts["m"], ask(max_tokens=1)))
    await until(lambda: len(engine_of(experts["m"])._queue))
    with pytest.raises(ExpertUnavailableError) as caught:
        await run(experts["m"], ask())
    assert caught.value.retry_after_s
    running.cancel()
    assert await waiting
    await experts["m"].close()


@pytest.mark.usefixtures("slow")
async def test_a_tenant_that_fills_the_queue_does_not_keep_others_out(llama: Path) -> None:
    experts = build(llama, max_batch=1, max_queue=3)
    engine = engine_of(experts["m"])
    running = asyncio.create_task(run(experts["m"], ask(tenant="many", **ENDLESS)))
    await until(lambda: engine._rows() and engine._free == 0)
    many = [asyncio.create_task(run(experts["m"], ask(tenant="many", max_tokens=1))) for _ in range(3)]
    await until(lambda: len(engine._queue) == 3)
    few = asyncio.create_task(run(experts["m"], ask(tenant="few", max_tokens=1)))
    await until(lambda: len([task for task in many if task.done()]) == 1)
    with pytest.raises(ExpertUnavailableError):
        await next(task for task in many if task.done())
    running.cancel()
    assert await few
    for task in many:
        if not task.done():
            assert await task
    await experts["m"].close()


async def test_a_failing_step_fails_its_requests_and_no_later_ones(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Batch) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", fail)
        with pytest.raises(ExpertUnavailableError):
            await run(fleet["base"], ask())
    assert await text_of(fleet["base"], ask()) is not None
    assert await fleet["base"].healthy()


async def test_closing_ends_what_runs(llama: Path) -> None:
    experts = build(llama)
    running = asyncio.create_task(run(experts["m"], ask(**ENDLESS)))
    await until(lambda: engine_of(experts["m"])._rows())
    await experts["m"].close()
    with pytest.raises(ExpertUnavailableError):
        await running
    assert not await experts["m"].healthy()
    with pytest.raises(ExpertUnavailableError):
        await run(experts["m"], ask())


async def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    config = tmp_path / "generation_config.json"
    config.write_bytes(orjson.dumps({**orjson.loads(config.read_bytes()), "do_sample": False}))
    experts = build(model)
    request = ask(temperature=None)
    assert await text_of(experts["m"], request) == await text_of(experts["m"], ask())
    await experts["m"].close()


def test_wrong_models_are_config_errors(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpertConfigError, match="no folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(ExpertConfigError, match="cannot be loaded"):
        build(tmp_path)
    with pytest.raises(ExpertConfigError, match="context_length 1024"):
        build(llama, context_length=1024)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ExpertConfigError, match=r"expert 'adapter'.*adapter_config"):
        build(llama, tmp_path / "adapter")


def test_models_with_wrong_weights_are_config_errors(llama: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama)
    weights = network.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(tmp_path)
    network.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if "layers.1.mlp" not in k})
    with pytest.raises(ExpertConfigError, match="lacks weights"):
        build(tmp_path)
    network.save_pretrained(tmp_path, state_dict={k: v * float("nan") for k, v in weights.items()})
    with pytest.raises(ExpertConfigError, match="not finite"):
        build(tmp_path)
    tokenizer.add_tokens(["one-too-many"])
    tokenizer.save_pretrained(tmp_path)
    network.save_pretrained(tmp_path)
    with pytest.raises(ExpertConfigError, match="tokenizer has 261 tokens"):
        build(tmp_path)
