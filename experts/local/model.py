"""Loading a causal language model with its adapters, and running it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.logging import disable_progress_bar

from experts.errors import ExpertConfigError
from experts.fleet import ExpertGroup, FleetEntry, LocalSource
from experts.local.attention import use_own_attention
from experts.local.pool import AdapterPool
from experts.local.request import SamplingDefaults
from experts.local.sites import Current, LinearLayers, Plan, Site, install_sites

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A base model with room for adapters, ready to run.

    `longest` is the most tokens that an answer with its prompt may have. `batchable` says whether answers can share a
    cache: those of models with plain attention can.
    """

    network: Any
    tokenizer: Any
    device: torch.device
    sites: Mapping[str, Site]
    linears: LinearLayers
    current: Current
    pool: AdapterPool
    end_tokens: frozenset[int]
    longest: int
    vocabulary: int
    defaults: SamplingDefaults
    takes: frozenset[str]
    batchable: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and caches."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def layers(self) -> int:
        """How many of them have a cache."""
        return len(self.new_cache().layers)

    def new_cache(self) -> DynamicCache:
        """An empty key-value cache of the kinds of layers that the model has."""
        return DynamicCache(config=self.network.config)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache, plan: Plan) -> Tensor:
        """Logits [B, V] that follow `tokens` [B, T], which are added to `cache`.

        `positions` are [B, T]; `mask` is bool [B, L + T] and says which places of cache and tokens count, or what is
        added to attention's scores [B, 1, T, L + T]; None means that all count. `plan` is what adapters do.
        """
        self.current.set(plan)
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


def load_model(group: ExpertGroup) -> LocalModel:
    """Load the base of a group, and run it once. Raises `ExpertConfigError` that names the entry at fault."""
    base = group.head
    if base.local is None:
        raise ExpertConfigError(f"expert {base.name!r} is not local")
    disable_progress_bar()  # a bar for each load would fill a service's log
    device = _device(base)
    network = _load_network(base.name, base.local, device)
    tokenizer = load_tokenizer(base.name, base.local)
    config = network.config.get_text_config()
    for entry in group.entries:
        _check_context(entry, getattr(config, "max_position_embeddings", None))
    use_own_attention(network)
    sites, linears, current = install_sites(network, base.local.max_adapters)
    model = LocalModel(
        network=network,
        tokenizer=tokenizer,
        device=device,
        sites=sites,
        linears=linears,
        current=current,
        pool=AdapterPool(sites, base.local.max_adapters),
        end_tokens=_end_tokens(network, tokenizer),
        longest=max(entry.context_length for entry in group.entries),
        vocabulary=config.vocab_size,
        defaults=sampling_defaults(network.generation_config),
        takes=frozenset(inspect.signature(network.forward).parameters),
        batchable=all(type(layer) is DynamicLayer for layer in DynamicCache(config=network.config).layers),
    )
    _check_tokenizer(base, model)
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


def load_tokenizer(name: str, source: LocalSource) -> Any:
    """The tokenizer of the expert `name`. Raises `ExpertConfigError`."""
    try:
        return AutoTokenizer.from_pretrained(source.model, revision=source.revision or "main", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ExpertConfigError(f"expert {name!r}: tokenizer of {source.model!r} cannot be loaded: {error}") from error


def _check_folder(name: str, path: str) -> None:
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ExpertConfigError(f"expert {name!r}: there is no folder {path!r}")


def _end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the generation config and by the tokenizer."""
    configured = network.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def sampling_defaults(config: Any) -> SamplingDefaults:
    """What a generation config says of requests that say nothing."""
    if config.do_sample is False:
        return SamplingDefaults(temperature=0.0)
    given = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k", "min_p")}
    return SamplingDefaults(**{name: value for name, value in given.items() if value is not None})


def _check_context(entry: FleetEntry, most: int | None) -> None:
    if most is not None and entry.context_length > most:
        message = f"context_length {entry.context_length} is more than the model's {most}"
        raise ExpertConfigError(f"expert {entry.name!r}: {message}")


def _check_tokenizer(base: FleetEntry, model: LocalModel) -> None:
    """Raise where it has tokens that the model lacks. Using it once settles its state for all threads."""
    largest = max(len(model.tokenizer) - 1, *model.tokenizer("a")["input_ids"])
    if largest >= model.vocabulary:
        message = f"its tokenizer has {largest + 1} tokens, its model {model.vocabulary}"
        raise ExpertConfigError(f"expert {base.name!r}: {message}")
