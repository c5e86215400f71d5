"""The pocket models: tiny Llamas, and what makes them train fast on a CPU.

A model computes in bfloat16 where the CPU multiplies it faster than float32 (with AMX several times, with AVX-512's
bfloat16 twice; without them float32 is the faster one), while the optimizer steps on float32 masters (*Mixed
Precision Training*, arXiv 1710.03740). A low-rank adapter (LoRA, arXiv 2106.09685) is trained through the weight it
makes, ``W + s B A``: the gradient of that small matrix gives those of ``A`` and ``B`` exactly, and a step costs no
more than one of full training.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from training.pocket.tokens import CONTEXT, END, PAD

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RANK = 16
LORA_ALPHA = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "base": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    "generalist": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 4, "num_attention_heads": 12},
}
_ABLE = torch.cpu.get_capabilities()
COMPUTE = torch.bfloat16 if _ABLE.get("amx_bf16") or _ABLE.get("avx512_bf16") else torch.float32
_ATTENTION = "pocket_training"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """Causal attention over right-padded rows ``[B, heads, T, d]``, in float32, whose backward is faster on CPUs."""
    mixed = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    return mixed.to(query.dtype).transpose(1, 2).contiguous(), None


def new_model(shape: str, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """A model with fresh weights, to be trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(COMPUTE)


def train_attention(model: "LlamaForCausalLM") -> None:
    """Makes the model use the training attention, which takes right-padded rows and no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)


def answer_loss(model: "LlamaForCausalLM", ids: Tensor, answer: Tensor) -> Tensor:
    """Summed cross-entropy of the answers' tokens.

    Args:
        ids: Token ids ``[B, T]``, padded on the right.
        answer: Which of them belong to an answer, bool ``[B, T]``.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][answer[:, 1:]]
    return functional.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][answer[:, 1:]], reduction="sum")


class Masters(Protocol):
    """Float32 parameters that an optimizer steps on, and their way into a model that computes and back."""

    parameters: dict[str, nn.Parameter]

    def write(self, model: "LlamaForCausalLM") -> None:
        """Sets the model's weights from the masters."""

    def read_gradients(self, model: "LlamaForCausalLM") -> None:
        """Moves the gradients of the model's weights to the masters."""


class FullMasters:
    """Every weight of a model."""

    def __init__(self, model: "LlamaForCausalLM") -> None:
        self.parameters = {name: nn.Parameter(weight.detach().float()) for name, weight in model.named_parameters()}

    def write(self, model: "LlamaForCausalLM") -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(self.parameters[name])

    def read_gradients(self, model: "LlamaForCausalLM") -> None:
        for name, weight in model.named_parameters():
            self.parameters[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None


class LoraMasters:
    """Low-rank pairs for every projection of a frozen model; ``parameters`` has PEFT's names."""

    def __init__(self, model: "LlamaForCausalLM", seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._frozen: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.split(".")[-2] in PROJECTIONS)
            if weight.requires_grad:
                self._frozen[name] = weight.detach().float()
                rows, columns = weight.shape
                a = torch.empty(RANK, columns).uniform_(-1, 1, generator=generator) * columns**-0.5
                self.parameters[_lora_name(name, "A")] = nn.Parameter(a)
                self.parameters[_lora_name(name, "B")] = nn.Parameter(torch.zeros(rows, RANK))

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.parameters[_lora_name(name, "A")], self.parameters[_lora_name(name, "B")]

    def write(self, model: "LlamaForCausalLM") -> None:
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, frozen in self._frozen.items():
                a, b = self._pair(name)
                weights[name].copy_(frozen + LORA_ALPHA / RANK * b @ a)

    def read_gradients(self, model: "LlamaForCausalLM") -> None:
        weights = dict(model.named_parameters())
        for name in self._frozen:
            a, b = self._pair(name)
            gradient = weights[name].grad
            if gradient is None:
                continue
            gradient = LORA_ALPHA / RANK * gradient.float()
            a.grad, b.grad = b.detach().T @ gradient, gradient @ a.detach().T
            weights[name].grad = None


def _lora_name(weight_name: str, side: str) -> str:
    return f"base_model.model.{weight_name.removesuffix('.weight')}.lora_{side}.weight"


def save_adapter(masters: LoraMasters, folder: Path) -> None:
    """Writes an adapter in PEFT's format, in bfloat16."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM", inference_mode=True
    ).save_pretrained(str(folder))
    tensors = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in masters.parameters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_model(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes a model and its tokenizer in Hugging Face's format, in bfloat16."""
    model.to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, adapter: Path | None = None) -> "LlamaForCausalLM":
    """A saved model in float32, with an adapter merged into its weights if one is given."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        pairs = load_file(adapter / "adapter_model.safetensors")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.split(".")[-2] in PROJECTIONS:
                    a, b = pairs[_lora_name(name, "A")].float(), pairs[_lora_name(name, "B")].float()
                    weight += LORA_ALPHA / RANK * b @ a
    return model.eval()
