"""Training for real, on models of a few thousand weights: it learns, resumes exactly and writes loadable files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training.pocket import model as pocket_model
from training.pocket.answers import answers
from training.pocket.fleet import Member
from training.pocket.generate import respond
from training.pocket.model import LoraMasters, load_model, new_model
from training.pocket.questions import PocketError
from training.pocket.tokens import build_tokenizer
from training.pocket.train import RECIPES, collate, draw_pairs, train

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
QUICK = replace(RECIPES["base"], steps=6, examples=16, warmup=1, checkpoint_every=3)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pocket_model.SHAPES, "base", TINY)


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("base", whole, whole / "work", recipe=QUICK)
    train("base", parts, parts / "work", recipe=QUICK, stop_at=3)
    assert not (parts / "base").exists()
    train("base", parts, parts / "work", recipe=QUICK)
    for name, weight in load_file(whole / "base" / "model.safetensors").items():
        assert torch.equal(weight, load_file(parts / "base" / "model.safetensors")[name]), name


def test_loss_falls(tmp_path: Path) -> None:
    recipe = replace(QUICK, steps=40, examples=32, lr=1e-2)
    assert train("base", tmp_path, tmp_path, recipe=recipe) < train("base", tmp_path, tmp_path / "short", recipe=QUICK)


def test_specialist_is_a_peft_adapter_and_answers_as_when_merged(tmp_path: Path) -> None:
    from peft import PeftModel

    train("base", tmp_path, tmp_path, recipe=QUICK)
    train("roman", tmp_path, tmp_path, recipe=replace(QUICK, lr=1e-1))
    tokenizer = build_tokenizer()
    adapter = tmp_path / "adapters" / "roman"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = tokenizer("<|user|>Write 8 in Roman numerals.<|assistant|>", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, adapter)(ids).logits
        merged = load_model(tmp_path / "base", adapter)(ids).logits
    assert (plain - adapted).abs().max() > 1e-3
    torch.testing.assert_close(adapted, merged)


def test_an_adapter_is_always_added_to_the_base_as_it_was() -> None:
    """Whatever the number of steps, in float32 too."""
    model = new_model(TINY, build_tokenizer(), 0).float()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters = LoraMasters(model, 0, rank=4)
    for pair in masters.parameters.values():
        torch.nn.init.normal_(pair, std=0.1)
    masters.write(model)
    once = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters.write(model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), once[name])
    assert any(not torch.equal(once[name], weight) for name, weight in before.items())


def test_specialist_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(PocketError, match="train 'base' first"):
        train("roman", tmp_path, tmp_path)


def test_batch_answers_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    train("base", tmp_path, tmp_path, recipe=QUICK)
    tokenizer, model = build_tokenizer(), load_model(tmp_path / "base")
    queries = ["What is 4 + 5?", "Sort the letters of 'castle' alphabetically.", "Hi"]
    together = respond(model, tokenizer, queries)
    assert together == [respond(model, tokenizer, [query])[0] for query in queries]
    assert all(response.output_tokens <= 48 for response in together)


def test_collate_marks_exactly_the_answers() -> None:
    tokenizer = build_tokenizer()
    pairs = draw_pairs("arithmetic", replace(QUICK, examples=100), 0, 0)
    texts = [
        tokenizer.decode(row[marked])
        for ids, answer in collate(tokenizer, pairs)
        for row, marked in zip(ids, answer, strict=True)
    ]
    assert sorted(texts) == sorted(f"{answer}<|end|>" for _, answer in pairs)


def test_a_whole_model_goes_on_from_its_weights(tmp_path: Path) -> None:
    train("base", tmp_path, tmp_path / "first", recipe=QUICK)
    before = load_file(tmp_path / "base" / "model.safetensors")
    train("base", tmp_path, tmp_path / "second", seed=1, recipe=replace(QUICK, lr=0.0), from_weights=True)
    after = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    with pytest.raises(PocketError, match="no trained model"):
        train("generalist", tmp_path, tmp_path / "third", recipe=QUICK, from_weights=True)


def test_kept_answers_are_those_of_these_weights(tmp_path: Path) -> None:
    train("base", tmp_path, tmp_path / "work", recipe=QUICK)
    member, queries = Member("base", tmp_path), ["What is 4 + 5?", "Hi"]
    first = answers(member, queries, tmp_path)
    assert first == answers(member, queries, None)
    (path,) = (tmp_path / "answers").iterdir()
    path.write_text(path.read_text().replace(json.dumps(first[0].text), '"kept"'))
    assert answers(member, queries, tmp_path)[0].text == "kept"
    train("base", tmp_path, tmp_path / "other", seed=5, recipe=replace(QUICK, lr=1e-1))
    answers(member, queries, tmp_path)
    assert len(list((tmp_path / "answers").iterdir())) == 2
