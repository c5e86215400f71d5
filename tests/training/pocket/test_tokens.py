"""The tokenizer: loads without code of ours, loses nothing, and shows a question's payload letter by letter."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.pocket.fleet import FLEET
from training.pocket.grading import sample
from training.pocket.tokens import SPECIAL, build_tokenizer, encode_pairs, prompt_text, whole_words

TOKENIZER = build_tokenizer()


def test_loads_with_auto_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " What is 4 + 5? "}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == prompt_text("What is 4 + 5?")
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.eos_token == "<|end|>"


def test_chat_template_keeps_every_turn() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|user|>Hi<|assistant|>Hello<|end|><|user|>Bye<|assistant|>"


@given(st.text())
def test_any_text_survives(text: str) -> None:
    if not any(token in text for token in SPECIAL):
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["'planet'", "XLVII", "2024-03-07"])
def test_payload_falls_apart_into_letters(text: str) -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"]) == list(text)


@pytest.mark.parametrize("part", ["base", "generalist"])
def test_shipped_tokenizer_is_the_built_one(part: str) -> None:
    """A phrasing with a new word changes the vocabulary, and with it what the shipped weights mean."""
    assert AutoTokenizer.from_pretrained(FLEET / part).get_vocab() == TOKENIZER.get_vocab()


def test_phrasings_are_whole_words() -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("Convert weeks to days")["input_ids"]) == [
        "Convert",
        "Ġweeks",
        "Ġto",
        "Ġdays",
    ]
    assert len(set(whole_words())) == len(whole_words())


def test_encoded_pairs_end_with_the_answer() -> None:
    questions = list(sample(0, 50))
    rows = list(encode_pairs(TOKENIZER, [(q.query, q.answer) for q in questions]))
    for question, (ids, prompt) in zip(questions, rows, strict=True):
        assert TOKENIZER.decode(ids[:prompt]) == prompt_text(question.query)
        assert TOKENIZER.decode(ids[prompt:]) == f"{question.answer}<|end|>"
