"""Mixtures and gates by name, and adapters that come and go, in one batch on one engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.build import build_experts
from experts.errors import ExpertConfigError, ExpertRequestError, ExpertUnavailableError
from experts.expert import Expert
from experts.fleet import Fleet, FleetEntry, load_fleet
from experts.local.expert import LocalExpert
from experts.mixing import RequestMixture, fresh_adapters, install_mixture, load_mixture, read_adapters
from experts.mixtures import MixtureName, is_mixture, parse_mixture
from tests.experts.asking import ENDLESS, TEXT, answer, ask, run, text_of, until
from tests.experts.models import save_adapter


@pytest.fixture(scope="module")
def gate(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved mixture of two adapters with a gate that prefers one strongly, and the other elsewhere."""
    folder = tmp_path_factory.mktemp("gates")
    paths = {name: save_adapter(llama, folder / name, seed=i) for i, name in enumerate(("left", "right"), start=5)}
    model = AutoModelForCausalLM.from_pretrained(llama)
    mixture = install_mixture(model, read_adapters(paths, model), "mola", {"k": 1})
    torch.manual_seed(0)
    with torch.no_grad():
        for one in mixture.gates.values():
            one.weight.normal_(std=2.0)  # type: ignore[operator,union-attr]
    mixture.save(folder / "both")
    return folder / "both"


@pytest.fixture(scope="module")
def mixed_fleet(llama: Path, adapters: list[Path], gate: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    entry = {"context_length": 512}
    experts: list[dict[str, Any]] = [
        {"name": "base", "local": {"model": str(llama), "max_batch": 16, "max_queue": 8, "max_adapters": 3}, **entry},
        *({"name": f"my-{path.name}", "adapter": {"base": "base", "path": str(path)}, **entry} for path in adapters),
        {"name": "blend", "mixture": {"base": "base", "adapters": {"my-one": 0.6, "my-three": 0.4}}, **entry},
        {"name": "gated", "mixture": {"base": "base", "gate": str(gate)}, **entry},
    ]
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": experts}))
    return load_fleet(path)


@pytest.fixture(scope="module")
async def experts(mixed_fleet: Fleet) -> AsyncIterator[dict[str, Expert]]:
    built = build_experts(mixed_fleet)
    yield built
    for expert in built.values():
        await expert.close()


def base_of(experts: dict[str, Expert]) -> LocalExpert:
    assert isinstance(experts["base"], LocalExpert)
    return experts["base"]


def greedy(model: Any, folder: Path, text: str = TEXT) -> str:
    """transformers' own greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_names() -> None:
    assert parse_mixture("b+x:0.7+y:-3e-1") == MixtureName("b", {"x": 0.7, "y": -0.3})
    assert parse_mixture("b+x") == MixtureName("b", {"x": 1.0})
    assert parse_mixture("b+gate:g") == MixtureName("b", gate="g")
    assert is_mixture("b+x")
    assert not any(map(is_mixture, ("b", "auto:cheap", None, 5)))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("b+", "write BASE"),
        ("+x", "write BASE"),
        ("b+x++y", "write BASE"),
        ("b+x:nan", "finite number"),
        ("b+x:inf", "finite number"),
        ("b+x:1e7", "at most 1e\\+06"),
        ("b+x:-1e39", "at most 1e\\+06"),
        ("b+x:lots", "'lots'"),
        ("b+x:", "finite number"),
        ("b+x:1+x:2", "named twice"),
        ("b+gate:g+x", "gate decides alone"),
    ],
)
def test_names_that_say_nothing_are_refused(name: str, complaint: str) -> None:
    with pytest.raises(ExpertRequestError, match=complaint) as caught:
        parse_mixture(name)
    assert caught.value.param == "model"


async def test_a_static_mixture_is_pefts(experts: dict[str, Expert], llama: Path, adapters: list[Path]) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapters[0])
    model.load_adapter(adapters[2], "three")
    model.add_weighted_adapter(["default", "three"], [0.6, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    expected = greedy(model, llama)
    assert await text_of(experts["base"], ask(model="base+my-one:0.6+my-three:0.4")) == expected
    assert await text_of(experts["base"], ask(model="base+one:0.6+three:0.4")) == expected
    assert await text_of(experts["blend"], ask()) == expected
    assert expected != await text_of(experts["base"], ask(model="base+one:0.5+three:0.5"))


async def test_a_gate_answers_as_it_does_in_its_model(experts: dict[str, Expert], llama: Path, gate: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    mixture = load_mixture(model, gate)
    expected = greedy(model, llama)
    assert await text_of(experts["gated"], ask()) == expected
    assert await text_of(experts["base"], ask(model="base+gate:both")) == expected
    bias = {"left": 50.0}
    with mixture.requests([RequestMixture(bias=bias)]):
        steered = greedy(model, llama)
    assert await text_of(experts["base"], ask(model="base+gate:both", gate_bias=bias)) == steered
    mixture.remove()
    assert len({expected, steered, greedy(model, llama)}) == 3


async def test_null_forbids_an_adapter_and_without_any_the_base_answers(
    experts: dict[str, Expert], llama: Path, gate: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    mixture = load_mixture(model, gate)
    with mixture.requests([RequestMixture.only("right")]):
        right = greedy(model, llama)
    assert await text_of(experts["base"], ask(model="base+gate:both", gate_bias={"left": None})) == right
    mixture.remove()
    base = greedy(model, llama)
    assert await text_of(experts["base"], ask(model="base+gate:both", gate_bias={"left": None, "right": None})) == base
    assert await text_of(experts["base"], ask(model="base+gate:both", gate_bias={})) not in (right, base)


def shares_of(model: Any, mixture: Any, folder: Path, text: str) -> dict[str, Any]:
    """What the gates decide for all tokens of prompt and greedy answer but its last, in one pass over them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        whole = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        for name, one in mixture.gates.items():
            one.register_forward_hook(lambda _gate, _given, made, name=name: seen.__setitem__(name, made))
        model(whole[:, :-1])
    means = {
        name: [float((made.weights * (made.indices == e)).sum(1).mean()) for e in range(2)]
        for name, made in seen.items()
    }
    return {
        "tokens": whole.shape[1] - 1,
        "layers": {
            name: {adapter: share for adapter, share in zip(mixture.adapters, row, strict=True) if share}
            for name, row in means.items()
        },
    }


async def test_a_gate_tells_its_load_for_the_requests_own_tokens(
    experts: dict[str, Expert], llama: Path, gate: Path
) -> None:
    """Prompts of different lengths in one pass, padded, and answers that grow together."""
    texts = ["a", TEXT, "another question " * 4]
    plain = [ask(text, model="base+gate:both") for text in texts]
    bare = [await text_of(experts["base"], request) for request in plain]
    asked = [ask(text, model="base+gate:both", gate_load=True) for text in texts]
    answers = await asyncio.gather(*(answer(experts["base"], request) for request in (*asked, *plain)))
    assert [one["choices"][0]["message"]["content"] for one in answers] == bare + bare
    model = AutoModelForCausalLM.from_pretrained(llama)
    mixture = load_mixture(model, gate)
    for text, told in zip(texts, answers[:3], strict=True):
        expected = shares_of(model, mixture, llama, text)
        assert told["gate_load"]["tokens"] == expected["tokens"]
        assert told["gate_load"]["layers"].keys() == expected["layers"].keys() == mixture.gates.keys()
        for name, shares in expected["layers"].items():
            assert told["gate_load"]["layers"][name] == pytest.approx(shares, abs=1e-6), name
    assert not any("gate_load" in one for one in answers[3:])
    assert len({str(one["gate_load"]["layers"]) for one in answers[:3]}) == 3


async def test_a_streams_last_chunk_and_all_choices_tell_the_load(experts: dict[str, Expert]) -> None:
    one = await answer(experts["gated"], ask(gate_load=True, ignore_eos=True))
    parts = await run(experts["gated"], ask(gate_load=True, ignore_eos=True, stream=True))
    chunks = [orjson.loads(part.data) for part in parts if part.data]
    assert (chunks[-1]["choices"], chunks[-1]["gate_load"]) == ([], one["gate_load"])
    assert not any("gate_load" in chunk for chunk in chunks[:-1])
    two = await answer(experts["gated"], ask(gate_load=True, ignore_eos=True, n=2))
    assert two["gate_load"]["tokens"] == one["gate_load"]["tokens"] + 11  # the prompt is read once
    left = await answer(experts["gated"], ask(gate_load=True, gate_bias={"right": None}))
    assert all(shares == {"left": 1.0} for shares in left["gate_load"]["layers"].values())


async def test_what_a_gate_cannot_do_is_refused_before_the_engine_is_asked(
    experts: dict[str, Expert], llama: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    install_mixture(model, fresh_adapters(model, "smora", rank=8), "smora").save(tmp_path / "ranks")
    base = base_of(experts)
    await base.load_adapter("ranks", str(tmp_path / "ranks"))
    (adapter,) = base._registry._gates["ranks"].adapters  # type: ignore[attr-defined]
    for field, wish in (("gate_bias", {adapter: 1.0}), ("gate_load", True)):
        with pytest.raises(ExpertRequestError, match=field) as caught:
            await run(base, ask(model="base+gate:ranks", **{field: wish}))
        assert (caught.value.param, caught.value.status) == (field, 400)
    assert await text_of(base, ask(model="base+gate:ranks"))
    assert await base.healthy()
    await base.unload_adapter("ranks")


async def test_everything_together_is_as_each_alone(experts: dict[str, Expert]) -> None:
    """Base, adapters, mixtures, gates with biases of their own, greedy and sampled: more adapters than slots."""
    kinds: list[dict[str, Any]] = [
        {"model": "base"},
        {"model": "base+one"},
        {"model": "base+two:0.5"},
        {"model": "base+three:-0.5+one:1.5"},
        {"model": "base+gate:gated"},
        {"model": "base+gate:gated", "gate_bias": {"right": 50.0}},
        {"model": "base+gate:gated", "gate_bias": {"left": 50.0}},
    ]
    requests = [
        ask(f"question {i} " * (i % 5), temperature=t, seed=i, max_tokens=8 + i, ignore_eos=True, **kind)
        for i, (t, kind) in enumerate((t, kind) for t in (0, 1.0) for kind in kinds)
    ]
    alone = [await text_of(experts["base"], request) for request in requests]
    together = await asyncio.gather(*(text_of(experts["base"], request) for request in requests))
    assert together == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"model": "base+nobody"}, "model", 404),
        ({"model": "base+gate:nobody"}, "model", 404),
        ({"model": "other+one"}, "model", 404),
        ({"model": "base+one:1+my-one:1"}, "model", 400),
        ({"model": "base+one:x"}, "model", 400),
        ({"model": "base+gate:both", "gate_bias": {"nobody": 1}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": {"left": float("inf")}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": {"left": 1e39}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": {"left": 10**400}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": {"left": "1"}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": {"left": True}}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_bias": [1]}, "gate_bias", 400),
        ({"model": "base+gate:both", "gate_load": "yes"}, "gate_load", 400),
        ({"model": "base+one", "gate_load": True}, "gate_load", 400),
        ({"model": "base", "gate_load": True}, "gate_load", 400),
        ({"model": "base+one", "gate_bias": {"left": 1}}, "gate_bias", 400),
    ],
)
async def test_what_cannot_be_mixed_is_refused(
    experts: dict[str, Expert], body: dict[str, Any], param: str, status: int
) -> None:
    with pytest.raises(ExpertRequestError) as caught:
        await run(experts["base"], ask(**body))
    assert (caught.value.param, caught.value.status) == (param, status)


async def test_a_mixture_of_more_adapters_than_slots_is_refused(experts: dict[str, Expert], llama: Path) -> None:
    base = base_of(experts)
    await base.load_adapter("four", str(save_adapter(llama, Path(str(llama) + "-four"), seed=8)))
    with pytest.raises(ExpertRequestError, match="at most 3"):
        await run(base, ask(model="base+one+two+three+four"))
    await base.unload_adapter("four")


async def test_adapters_come_change_and_go_while_it_serves(
    experts: dict[str, Expert], llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    base = base_of(experts)
    as_one, as_two = [await text_of(base, ask(model=f"base+{name}")) for name in ("one", "two")]
    await base.load_adapter("mine", str(adapters[0]))
    assert await text_of(base, ask(model="base+mine")) == as_one
    entry = FleetEntry(name="mine", context_length=512, adapter={"base": "base", "path": str(adapters[0])})
    adapted = base.adapted(entry)
    assert await text_of(adapted, ask()) == as_one
    await adapted.close()
    long = await text_of(base, ask(model="base+one", **ENDLESS))
    running = asyncio.create_task(text_of(base, ask(model="base+mine", **ENDLESS)))
    await until(lambda: any(row.job.mixture.label == "mine:1" for row in base._engine._rows()))
    await base.load_adapter("mine", str(adapters[1]))
    assert await text_of(base, ask(model="base+mine")) == as_two
    await base.unload_adapter("mine")
    assert await running == long
    with pytest.raises(ExpertRequestError):
        await run(base, ask(model="base+mine"))
    with pytest.raises(ExpertConfigError):
        await base.unload_adapter("mine")


async def test_adapters_and_gates_come_from_urls(experts: dict[str, Expert], adapters: list[Path], gate: Path) -> None:
    base = base_of(experts)
    memory = fsspec.filesystem("memory")
    memory.put(str(adapters[1]), "/far/two", recursive=True)
    memory.put(str(gate), "/far/gate", recursive=True)
    await base.load_adapter("far", "memory://far/two")
    await base.load_adapter("far-gate", "memory://far/gate")
    assert await text_of(base, ask(model="base+far")) == await text_of(base, ask(model="base+two"))
    assert await text_of(base, ask(model="base+gate:far-gate")) == await text_of(experts["gated"], ask())
    with pytest.raises(ExpertConfigError, match="no adapter at"):
        await base.load_adapter("x", "memory://far/nothing")
    with pytest.raises(ExpertConfigError, match="no-such"):
        await base.load_adapter("x", "no-such://far")
    for name in ("far", "far-gate"):
        await base.unload_adapter(name)


async def test_what_a_file_system_raises_is_said(experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """As botocore has it."""

    def refuse(url: str) -> None:
        raise NoCredentialsError("there are no credentials")

    monkeypatch.setattr("fsspec.url_to_fs", refuse)
    with pytest.raises(ExpertConfigError, match="'s3://far/two' cannot be read: there are no credentials"):
        await base_of(experts).load_adapter("x", "s3://far/two")


async def test_a_broken_adapter_is_refused_and_harms_nobody(
    experts: dict[str, Expert], adapters: list[Path], tmp_path: Path
) -> None:
    base = base_of(experts)
    expected = await text_of(base, ask(model="base+one", **ENDLESS))
    running = asyncio.create_task(text_of(base, ask(model="base+one", **ENDLESS)))
    shutil.copytree(adapters[0], tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ExpertConfigError, match="cannot be read"):
        await base.load_adapter("broken", str(tmp_path / "broken"))
    with pytest.raises(ExpertRequestError):
        await run(base, ask(model="base+broken"))
    assert await running == expected


async def test_numbers_that_overflow_fail_their_request_alone(
    experts: dict[str, Expert], adapters: list[Path], tmp_path: Path
) -> None:
    """Finite weights whose products are not, in a batch with others, whose slots they leave clean."""
    base = base_of(experts)
    shutil.copytree(adapters[0], tmp_path / "huge")
    weights = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({name: tensor * 1e37 for name, tensor in load_file(weights).items()}, weights)
    await base.load_adapter("huge", str(tmp_path / "huge"))
    others = [ask("x" * i, model=model, **ENDLESS) for i, model in enumerate(("base", "base+one", "base+gate:both"))]
    expected = [await text_of(base, request) for request in others]
    running = [asyncio.create_task(text_of(base, request)) for request in others]
    for _ in range(4):
        with pytest.raises(ExpertUnavailableError, match="not finite"):
            await run(base, ask("word " * 9, model="base+huge:0.3+one"))
    assert await asyncio.gather(*running) == expected
    await base.unload_adapter("huge")


async def test_a_gate_that_gets_numbers_that_overflow_fails_its_request_alone(
    experts: dict[str, Expert], gate: Path, tmp_path: Path
) -> None:
    base = base_of(experts)
    shutil.copytree(gate, tmp_path / "wild")
    for name in ("left", "right"):
        weights = tmp_path / "wild" / "adapters" / name / "adapter_model.safetensors"
        save_file({key: tensor * 1e30 for key, tensor in load_file(weights).items()}, weights)
    await base.load_adapter("wild", str(tmp_path / "wild"))
    others = [ask(model=model, **ENDLESS) for model in ("base", "base+one", "base+gate:both")]
    expected = [await text_of(base, request) for request in others]
    running = [asyncio.create_task(text_of(base, request)) for request in others]
    for _ in range(3):
        with pytest.raises(ExpertUnavailableError, match="not finite"):
            await run(base, ask(model="base+gate:wild"))
    assert await asyncio.gather(*running) == expected
    await base.unload_adapter("wild")


async def test_a_client_that_vanishes_and_one_that_never_ends_harm_nobody(experts: dict[str, Expert]) -> None:
    base = base_of(experts)
    expected = await text_of(base, ask(model="base+two"))
    endless = [base.generate(ask(model=f"base+{name}", stream=True, **ENDLESS)) for name in ("one", "two", "three")]
    for stream in endless:
        await anext(stream)
    await endless[0].aclose()  # type: ignore[attr-defined]
    assert await text_of(base, ask(model="base+two")) == expected
    for stream in endless[1:]:
        await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: not base._engine._rows())
    assert not base._model.pool._pins


async def test_the_work_of_an_answer_is_told(experts: dict[str, Expert]) -> None:
    base = base_of(experts)
    for name in ("one", "two", "three", "one"):
        await run(base, ask(model=f"base+{name}"))
    replies = await asyncio.gather(
        *(run(base, ask(model="base+one", max_tokens=30, ignore_eos=True)) for _ in range(3))
    )
    for [part] in replies:
        assert part.work is not None
        assert part.work.queue_s is not None
        assert 0 <= part.work.queue_s < part.work.first_token_s
        assert part.work.tokens_per_s
        assert 1 <= part.work.batch_size <= 3
        assert (part.work.adapter_hits, part.work.adapter_loads) == (1, 0)
    assert max(part.work.batch_size for [part] in replies if part.work) > 1.5


def test_a_fleets_mixtures_have_cards_and_share_their_base(mixed_fleet: Fleet) -> None:
    assert {card.name: card.kind for card in mixed_fleet.cards}["blend"] == "adapter"
    [group] = mixed_fleet.groups
    assert {entry.name for entry in group.entries} == {entry.name for entry in mixed_fleet.experts}


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({"base": "base"}, "adapters with their weights, or a gate"),
        ({"base": "base", "adapters": {"a": 1.0}, "gate": "./g"}, "adapters with their weights, or a gate"),
        ({"base": "base", "adapters": {"nobody": 1.0}}, "'nobody' is no adapter of 'base'; these are: 'a'"),
        ({"base": "a", "adapters": {"a": 1.0}}, "'a' is no local model; there are: 'base'"),
        ({"base": "base", "adapters": {"a": float("nan")}}, "finite"),
    ],
)
def test_wrong_mixtures_of_a_fleet_are_refused(tmp_path: Path, mixture: dict[str, Any], complaint: str) -> None:
    experts = [
        {"name": "base", "local": {"model": "./base"}},
        {"name": "a", "adapter": {"base": "base", "path": "./a"}},
        {"name": "mix", "mixture": mixture},
    ]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    with pytest.raises(ExpertConfigError, match=complaint):
        load_fleet(tmp_path / "fleet.yaml")
