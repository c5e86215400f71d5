"""LoRA adapters beside a frozen encoder: loaded and unloaded while it runs, every text of a batch through its own.

A linear layer that any adapter changes keeps all adapters' matrices in one `AdapterStack`; `kernels.mixed_lora` adds to
the frozen layer's output what each token's adapter says (one adapter a token, weight 1). Loading packs new stacks
beside those in use and swaps them in between two batches, so that nothing waits for it but the next batch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from experts.adapter_files import ENCODER_FILE
from experts.embedding.encoder import Encoder, FloatArray, Tokens
from experts.errors import ExpertConfigError
from experts.local.lora import NO_ADAPTER, LoraWeights, read_adapter
from kernels import AdapterStack, mixed_lora

Weights = Mapping[str, LoraWeights]
"""One adapter: layer name -> matrices."""


class AdaptedEncoder:
    """An encoder with named adapters. Thread safe: one batch or one change at a time."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._choice = _Choice()
        self._adapters: dict[str, Weights] = {}
        self._layers: dict[str, _AdaptedLinear] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self._adapters)

    @property
    def fingerprint(self) -> str:
        """The encoder's, which its adapters share: they change queries' vectors within the documents' space."""
        return self._encoder.fingerprint

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, cut to the most that the model reads."""
        return self._encoder.tokenize(texts)

    def encode(self, tokens: Tokens, adapters: Sequence[str | None]) -> FloatArray:
        """Unit vectors, float32 [B, D], of texts as tokens, each through the adapter named beside it, or none.

        Raises `ExpertConfigError` for an adapter that is not loaded.
        """
        with self._lock:
            places = self._places(adapters)
            if (places == NO_ADAPTER).all():
                self._choice.places = None
                return self._encoder.encode_tokens(tokens)
            return self._encoder.encode_tokens(tokens, lambda rows, mask: self._choice.set(places[rows], mask))

    def load(self, folders: Mapping[str, Path]) -> None:
        """Add adapters in PEFT's file format by name, or replace those of the same name.

        All or none are loaded. Raises `ExpertConfigError` that names the adapter at fault, also where it says that it
        was trained on another encoder.
        """
        read = {name: self._read(name, folder) for name, folder in folders.items()}
        with self._lock:
            self._install({**self._adapters, **read})

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises `ExpertConfigError` where there is none of that name."""
        with self._lock:
            if name not in self._adapters:
                raise ExpertConfigError(f"no adapter {name!r} is loaded")
            self._install({other: weights for other, weights in self._adapters.items() if other != name})

    def _read(self, name: str, folder: Path) -> Weights:
        try:
            if (trained_on := read_encoder(folder)) not in (None, self.fingerprint):
                raise ExpertConfigError(
                    f"it was trained on the encoder {str(trained_on)[:12]}, and this one is {self.fingerprint[:12]} "
                    "(weights, tokenizer, max_tokens or pooling differ)"
                )
            return read_adapter(folder, self._plain)
        except ExpertConfigError as error:
            raise ExpertConfigError(f"adapter {name!r}: {error}") from error

    @property
    def _plain(self) -> nn.Module:
        """The network as adapters know it: with its linear layers, not with what stands in for them."""
        return _Plain(self._encoder.network)

    def _places(self, adapters: Sequence[str | None]) -> npt.NDArray[np.int64]:
        known: dict[str | None, int] = {name: place for place, name in enumerate(self._adapters)}
        if lost := [name for name in adapters if name is not None and name not in known]:
            raise ExpertConfigError(f"no adapter {lost[0]!r} is loaded")
        return np.array([known.get(name, NO_ADAPTER) for name in adapters], np.int64)

    def _install(self, adapters: dict[str, Weights]) -> None:
        """Give every layer its new stack; one that no adapter changes any more becomes what it was."""
        network = self._encoder.network
        wanted = {layer for weights in adapters.values() for layer in weights}
        for name in sorted(wanted | set(self._layers)):
            if name not in self._layers:
                layer = network.get_submodule(name)
                self._layers[name] = _AdaptedLinear(layer, self._choice)
                _put(network, name, self._layers[name])
            self._layers[name].stack = _stack(self._layers[name].linear, [one.get(name) for one in adapters.values()])
        for name in set(self._layers) - wanted:
            _put(network, name, self._layers.pop(name).linear)
        self._adapters = adapters


def write_encoder(folder: Path, fingerprint: str) -> None:
    """Say beside an adapter on which encoder it was trained."""
    (folder / ENCODER_FILE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")


def read_encoder(folder: Path) -> str | None:
    """The fingerprint of the encoder that an adapter was trained on, where it is known. Raises `ExpertConfigError`."""
    try:
        said = json.loads((folder / ENCODER_FILE).read_bytes())
        return str(said["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExpertConfigError(f"{ENCODER_FILE} cannot be read: {error!r}") from error


class _Choice:
    """Which adapter each token of the coming pass goes through: [B * T, 1], or None where all go through none."""

    def __init__(self) -> None:
        self.places: Tensor | None = None
        self.weights = torch.ones(0, 1)

    def set(self, places: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> None:
        """For a batch: each text's adapter, and which of its tokens count [B, T]; padding goes through none."""
        tokens = np.where(mask > 0, places[:, None], NO_ADAPTER)
        self.places = torch.from_numpy(tokens.reshape(-1, 1))
        self.weights = torch.ones(tokens.size, 1)


class _AdaptedLinear(nn.Module):
    """A frozen linear layer and the adapters that change it. Input [B, T, in], output [B, T, out]."""

    def __init__(self, linear: nn.Module, choice: _Choice) -> None:
        super().__init__()
        self.linear = linear
        self.stack: AdapterStack | None = None
        self._choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus that of each token's adapter."""
        y: Tensor = self.linear(x)
        if self._choice.places is None or self.stack is None or x.dim() < 3:  # BERT's pooler, which no vector is of
            return y
        flat = mixed_lora(
            x.flatten(0, -2), self.stack, self._choice.places, self._choice.weights, base=y.flatten(0, -2)
        )
        return flat.view(y.shape)


class _Plain(nn.Module):
    """A network whose adapted layers are found as the linear layers that they are for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network

    def get_submodule(self, target: str) -> nn.Module:
        """The layer `target` without its adapters."""
        found = self._network.get_submodule(target)
        return found.linear if isinstance(found, _AdaptedLinear) else found


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def _stack(linear: nn.Module, weights: Sequence[LoraWeights | None]) -> AdapterStack | None:
    """All adapters of one layer; one that leaves this layer alone is one row of zeros."""
    if not any(weights):
        return None
    frozen = cast("nn.Linear", linear).weight
    nothing = (frozen.new_zeros(1, frozen.shape[1]), frozen.new_zeros(frozen.shape[0], 1))
    pairs = [(one.a.to(frozen), one.b.to(frozen)) if one else nothing for one in weights]
    return AdapterStack.pack([[pair] for pair in pairs], [one.scale if one else 1.0 for one in weights])
