"""Tiny models with random weights, of real architectures, saved as transformers and PEFT save them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda vocabulary: LlamaConfig(vocab_size=vocabulary, max_position_embeddings=512, **SHAPE),
    "qwen2": lambda vocabulary: Qwen2Config(vocab_size=vocabulary + 40, max_position_embeddings=512, **SHAPE),
    "mistral": lambda vocabulary: MistralConfig(
        vocab_size=vocabulary, max_position_embeddings=512, sliding_window=16, **SHAPE
    ),
    "bloom": lambda vocabulary: BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, seq_length=512),
    "gpt2": lambda vocabulary: GPT2Config(vocab_size=vocabulary, n_positions=512, n_embd=32, n_layer=2, n_head=4),
}


TARGETS = ("q_proj", "v_proj", "down_proj")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token for each byte, so that most characters beyond ASCII span several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(folder: Path, architecture: str = "llama", *, seed: int = 0, spread: float = 0.3) -> Path:
    """A random model in `folder`. `spread` is the standard deviation of its weights: large enough to prefer tokens."""
    tokenizer = byte_tokenizer()
    config = CONFIGS[architecture](len(tokenizer))
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.bos_token_id = None
    config.initializer_range = spread
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int = 0, targets: Sequence[str] = TARGETS, **lora: object) -> Path:
    """A random PEFT LoRA adapter of the model in `base`, made and saved by PEFT."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder
