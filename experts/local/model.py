"""Loading a causal language model with its adapters, and running it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from experts.errors import ExpertConfigError
from experts.fleet import AdapterSource, FleetEntry, LocalSource
from experts.local.lora import NO_ADAPTER, AdapterChoice, LoraWeights, install_adapters, read_adapter
from experts.local.request import SamplingDefaults

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A base model with all its adapters, ready to run. Adapter `i` of a forward pass is the group's i-th."""

    network: Any
    tokenizer: Any
    device: torch.device
    adapters: AdapterChoice
    end_tokens: frozenset[int]
    context_length: int | None
    vocabulary: int
    defaults: SamplingDefaults
    takes: frozenset[str]

    def new_cache(self) -> DynamicCache:
        """An empty key-value cache of the kinds of layers that the model has."""
        return DynamicCache(config=self.network.config)

    @property
    def mergeable(self) -> bool:
        """Whether caches of several sequences can be laid side by side: those of plain attention can."""
        return all(type(layer) is DynamicLayer for layer in self.new_cache().layers)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache, adapters: Sequence[int]
    ) -> Tensor:
        """Logits [B, V] that follow `tokens` [B, T], which are added to `cache`.

        `positions` are [B, T]; `mask` [B, L + T] says which places of cache and tokens count, None that all do.
        """
        self.adapters.set(adapters, self.device)
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self.network(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.takes},
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def load_model(base: FleetEntry, adapters: Sequence[FleetEntry]) -> LocalModel:
    """Load a base and its adapters, and run each once. Raises `ExpertConfigError` that names the entry at fault."""
    if base.local is None:
        raise ExpertConfigError(f"expert {base.name!r} is not local")
    disable_progress_bar()  # a bar for each load would fill a service's log
    device = _device(base)
    network = _load_network(base.name, base.local, device)
    tokenizer = _load_tokenizer(base.name, base.local)
    weights = [_load_adapter(entry, entry.adapter, network) for entry in adapters if entry.adapter]
    config = network.config.get_text_config()
    model = LocalModel(
        network=network,
        tokenizer=tokenizer,
        device=device,
        adapters=install_adapters(network, weights),
        end_tokens=_end_tokens(network, tokenizer),
        context_length=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        defaults=_defaults(network),
        takes=frozenset(inspect.signature(network.forward).parameters),
    )
    for entry in (base, *adapters):
        _check_context(entry, model)
    _check_tokenizer(base, model)
    _warm_up(base, adapters, model)
    return model


def _device(base: FleetEntry) -> torch.device:
    name = base.local.device if base.local else "auto"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ExpertConfigError(f"expert {base.name!r}: device {name!r} is asked for, but there is no GPU")
    return torch.device(name)


def _load_network(name: str, source: LocalSource, device: torch.device) -> Any:
    _check_folder(name, source.model)
    dtype = source.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        network, loading = AutoModelForCausalLM.from_pretrained(
            source.model,
            revision=source.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ExpertConfigError(f"expert {name!r}: model {source.model!r} cannot be loaded: {error}") from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ExpertConfigError(f"expert {name!r}: model {source.model!r} lacks weights: {missing}")
    return network.to(device).eval().requires_grad_(False)


def _load_tokenizer(name: str, source: LocalSource) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.model, revision=source.revision or "main", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ExpertConfigError(f"expert {name!r}: tokenizer of {source.model!r} cannot be loaded: {error}") from error


def _load_adapter(entry: FleetEntry, source: AdapterSource, network: Any) -> dict[str, LoraWeights]:
    try:
        return read_adapter(_adapter_folder(entry.name, source), network)
    except ExpertConfigError as error:
        message = f"expert {entry.name!r}: adapter {source.path!r} on {source.base!r}: {error}"
        raise ExpertConfigError(message) from error


def _adapter_folder(name: str, source: AdapterSource) -> Path:
    _check_folder(name, source.path)
    if Path(source.path).is_absolute():
        return Path(source.path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=_ADAPTER_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ExpertConfigError(f"it cannot be had from the hub: {error}") from error


def _check_folder(name: str, path: str) -> None:
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ExpertConfigError(f"expert {name!r}: there is no folder {path!r}")


def _end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the generation config and by the tokenizer."""
    configured = network.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def _defaults(network: Any) -> SamplingDefaults:
    config = network.generation_config
    if config.do_sample is False:
        return SamplingDefaults(temperature=0.0)
    given = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k", "min_p")}
    return SamplingDefaults(**{name: value for name, value in given.items() if value is not None})


def _check_context(entry: FleetEntry, model: LocalModel) -> None:
    if model.context_length is not None and entry.context_length > model.context_length:
        message = f"context_length {entry.context_length} is more than the model's {model.context_length}"
        raise ExpertConfigError(f"expert {entry.name!r}: {message}")


def _check_tokenizer(base: FleetEntry, model: LocalModel) -> None:
    """Raise where it has tokens that the model lacks. Using it once settles its state for all threads."""
    largest = max(len(model.tokenizer) - 1, *model.tokenizer("a")["input_ids"])
    if largest >= model.vocabulary:
        message = f"its tokenizer has {largest + 1} tokens, its model {model.vocabulary}"
        raise ExpertConfigError(f"expert {base.name!r}: {message}")


def _warm_up(base: FleetEntry, adapters: Sequence[FleetEntry], model: LocalModel) -> None:
    """A first pass with every adapter, and one with all of them, so that the first request is no slower than others."""
    choices = [NO_ADAPTER, *range(len(adapters))]
    for entry, choice in zip((base, *adapters), choices, strict=True):
        try:
            logits = _one_pass(model, [choice])
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ExpertConfigError(f"expert {entry.name!r}: its model does not run: {error}") from error
        if not bool(torch.isfinite(logits).all()):
            raise ExpertConfigError(f"expert {entry.name!r}: its model gives numbers that are not finite")
    if model.mergeable:
        _one_pass(model, choices)


@torch.inference_mode()
def _one_pass(model: LocalModel, adapters: Sequence[int]) -> Tensor:
    """Logits after a prompt of two tokens and one token more."""
    cache = model.new_cache()
    tokens = torch.zeros(len(adapters), 2, dtype=torch.long, device=model.device)
    positions = torch.arange(3, device=model.device).expand(len(adapters), -1)
    model.forward(tokens, positions[:, :2], None, cache, adapters)
    return model.forward(tokens[:, :1], positions[:, 2:], None, cache, adapters)
