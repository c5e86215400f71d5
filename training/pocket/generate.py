"""Greedy answers in batches: rows padded on the left, a key-value cache, and an end at the end token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.pocket.tokens import prompt_text

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 48
_BATCH = 128


@dataclass(frozen=True)
class Response:
    """What an expert answered.

    ``output_tokens`` counts the end token too, which ``confidence`` leaves out: the geometric mean of the others'
    probabilities.
    """

    text: str
    input_tokens: int
    output_tokens: int
    confidence: float


def respond(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", queries: Sequence[str]) -> list[Response]:
    """The model's most likely answers, in the order of the queries."""
    order = sorted(range(len(queries)), key=lambda index: len(queries[index]))
    responses: dict[int, Response] = {}
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        answers = _respond_to_batch(model, tokenizer, [queries[index] for index in part])
        responses.update(zip(part, answers, strict=True))
    return [responses[index] for index in range(len(queries))]


@torch.inference_mode()
def _respond_to_batch(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", queries: Sequence[str]
) -> list[Response]:
    prompts = [prompt_text(query) for query in queries]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    logprobs = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, new[..., None])[..., 0]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return [
        Response(
            tokenizer.decode(row, skip_special_tokens=True),
            int(mask.sum()),
            int((row != pad).sum()),
            _confidence(told[(row != pad) & (row != end)]),
        )
        for row, mask, told in zip(new, batch["attention_mask"], logprobs, strict=True)
    ]


def _confidence(logprobs: Tensor) -> float:
    return round(float(logprobs.mean().exp()), 4) if len(logprobs) else 0.0
