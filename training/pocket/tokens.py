"""The tokenizer: bytes, and the words of the phrasings kept whole.

A question's payload (the word to reverse, the numbers to add) must be seen letter by letter, while the words around
it are better read whole. So the vocabulary holds all 256 bytes and whole words, and no merges: ``ignore_merges``
takes a word that is in the vocabulary as it stands, and any other falls apart into its bytes.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from training.pocket.curriculum import LESSON_WORDS
from training.pocket.skills import SKILLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, SYSTEM, END = SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CONTEXT = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def whole_words() -> list[str]:
    """The words that are one token, in a fixed order: after a space, or capitalised at the start of a query."""
    phrasings = [p for skill in SKILLS.values() for task in skill.tasks for p in task.phrasings]
    words = {word for p in phrasings for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}|'\w", " ", p))}
    words |= {word for skill in SKILLS.values() for word in skill.words} | set(LESSON_WORDS)
    words = {word for word in words if len(word) > 1}
    return sorted({f" {word}" for word in words} | {word for word in words if word[0].isupper()})


def build_tokenizer(more_words: Sequence[str] = (), tags: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """The tokenizer with its chat template, as ``AutoTokenizer`` will load it.

    Args:
        more_words: Words to keep whole beside those of every member, a leading space being part of a word.
        tags: Texts that are one token wherever they stand; no special tokens: they stay when an answer is decoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in (*whole_words(), *more_words)]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def prompt_text(query: str) -> str:
    """What the chat template makes of one user message, ready for the answer."""
    return f"{USER}{query.strip()}{ASSISTANT}"


def encode_pairs(
    tokenizer: "PreTrainedTokenizerFast", pairs: Sequence[tuple[str, str]]
) -> Iterable[tuple[list[int], int]]:
    """Token ids of (query, answer) pairs with the length of the prompt in each."""
    prompts = tokenizer([prompt_text(query) for query, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([f"{answer}{END}" for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return ((prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True))
